"""Outputs of networks and of their preconditioned forms."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import preconditioning as pre
from bcm_jax.methods import ctm as trajectory
from bcm_jax.models import edm2
from bcm_jax.models import end_time
from tests.parity import files
from tests.parity import report
from tests.parity import trajectories
from tests.parity import weights

# What attention in half precision leaves of F.
HALF = 2e-3


class Inputs:
  """A file's arrays in one precision."""

  def __init__(self, file: files.Reference, precision: str):
    self._file, self._precision = file, precision

  def image(self, name: str):
    return jnp.asarray(self._file.image(f"in/{name}"), self._precision)

  def __getattr__(self, name: str):
    key = f"in/{name}"
    if key not in self._file:
      return None
    return jnp.asarray(self._file[key], self._precision)


def _select(file, outputs, precision) -> Iterator[report.Check]:
  """Checks of those outputs that the file holds; values are made when asked."""
  for name, make in outputs.items():
    if name in file.outputs:
      yield file.check(name, make(), precision)


def openai(file, precision):
  """U-Nets of OpenAI's CM, iCT and BCM: F and KarrasDenoiser.denoise."""
  model = weights.model(file)
  plain = weights.Model(
      model.family, model.network.clone(qkv_norm=False), model.image_size,
      model.batch, model.tensors,
  )
  w, given = model.weights(precision), Inputs(file, precision)
  y = model.labels(file)
  sigma_data = file.setting("sigma_data", 0.5)
  low = file.setting("sigma_min", 0.002)

  def raw(net, t, u):
    return net.raw(w, given.image("x"), t, u, y)

  def denoise(form, end=None, what="D"):
    seen = []
    end = jnp.full_like(given.sigma, low) if end is None else end
    d = model.map(
        w, form, given.image("xs"), given.sigma, end, y, seen=seen
    )
    return d if what == "D" else seen[0]

  two = pre.Bidirectional(sigma_data)
  outputs = {
      "F": lambda: raw(model, given.t, given.t_end),
      "F_nocosine": lambda: raw(plain, given.t, given.t_end),
      "F_t_swapped": lambda: raw(model, given.t_end, given.t),
      "denoise_F": lambda: denoise(two, given.sigma_end, "F"),
      "denoise_D": lambda: denoise(two, given.sigma_end),
      "denoise_noend_D": lambda: denoise(two),
      "denoise_D_boundary": lambda: denoise(
          pre.ConsistencyBoundary(sigma_data, low)
      ),
      "denoise_D_edm": lambda: denoise(pre.EDM(sigma_data)),
  }
  yield from _select(file, outputs, precision)
  if "out_half_attention/F" in file and precision == "float32":
    expected = file.image("out_half_attention/F")
    yield report.Check(
        "half_attention_F", outputs["F"](), expected,
        HALF * np.abs(expected).max(),
    )


def finetune_start(file, precision):
  """A consistency model made bidirectional, its output unchanged."""
  one = weights.model(file)
  added = file.group("bcm_added/")
  two = weights.Model(
      one.family, one.network.clone(two_time=True), one.image_size, one.batch,
      one.tensors | added,
  )
  w, given = one.weights(precision), Inputs(file, precision)
  y = one.labels(file)
  extended = end_time.add_second_time(two.network, w, two.params)
  if precision == "float32":
    ours = two.named(extended)
    for name, value in added.items():
      yield report.Check(f"bcm_added/{name}", ours[name], value, 0)
  sigma_data = file.setting("sigma_data", 0.5)
  low = jnp.full_like(given.sigma, file.setting("sigma_min", 0.002))
  x, xs = given.image("x"), given.image("xs")
  forms = {
      "cm_denoise_D_boundary": (
          one, w, pre.ConsistencyBoundary(sigma_data, float(low[0])), low
      ),
      "cm_denoise_D_edm": (one, w, pre.EDM(sigma_data), low),
      "bcm_denoise_D": (two, extended, pre.Bidirectional(sigma_data), low),
      "bcm_denoise_toend_D": (
          two, extended, pre.Bidirectional(sigma_data), given.sigma_end
      ),
  }
  outputs = {
      "cm_F": lambda: one.raw(w, x, given.t, None, y),
      "bcm_F": lambda: two.raw(extended, x, given.t, given.t_end, y),
  } | {
      name: lambda net=net, p=p, form=form, u=u: net.map(
          p, form, xs, given.sigma, u, y
      )
      for name, (net, p, form, u) in forms.items()
  }
  yield from _select(file, outputs, precision)


def edm(file, precision):
  """EDM's SongUNet and DhariwalUNet: F and EDMPrecond."""
  model = weights.model(file)
  w, given = model.weights(precision), Inputs(file, precision)
  y, aug = model.labels(file), given.augment_labels
  form = pre.EDM(file.setting("sigma_data", 0.5))

  def denoise(labels, aug):
    u = jnp.zeros_like(given.sigma)
    return model.map(w, form, given.image("xs"), given.sigma, u, labels, aug)

  yield from _select(file, {
      "F": lambda: model.raw(w, given.image("x"), given.c_noise, None, y, aug),
      "D": lambda: denoise(y, aug),
      "D_noaug": lambda: denoise(y, None if aug is None else 0 * aug),
      "D_nolabel": lambda: denoise(model.labels(file, none=True), aug),
  }, precision)


def edm2_network(file, precision):
  """EDM2's U-Net, its log-variance and forced weight normalisation."""
  model = weights.model(file)
  w, given = model.weights(precision), Inputs(file, precision)
  y = model.labels(file)
  form = pre.EDM(file.setting("sigma_data", 0.5))

  def denoise(labels):
    u = jnp.zeros_like(given.sigma)
    return model.map(w, form, given.image("xs"), given.sigma, u, labels)

  def logvar():
    c_noise = pre.edm_c_noise(given.sigma)
    out = model.network.apply({"params": w}, c_noise, method="logvar")
    return out[:, None, None, None]

  yield from _select(file, {
      "F": lambda: model.raw(w, given.image("x"), given.c_noise, None, y),
      "D": lambda: denoise(y),
      "D_nolabel": lambda: denoise(model.labels(file, none=True)),
      "logvar": logvar,
  }, precision)
  if precision == "float64":
    normal = model.named(edm2.normalize_weights(w))
    yield from file.tensors("renormalised", normal, precision)


def jcm(file, precision):
  """NCSN++ of OpenAI's CIFAR-10 code: F, denoiser and distiller."""
  model = weights.model(file)
  w, given = model.weights(precision), Inputs(file, precision)
  sigma_data = file.setting("data_std", 0.5)
  low = file.setting("t_min", 0.002)

  def denoise(form):
    u = jnp.full_like(given.t, low)
    return model.map(w, form, given.image("xs"), given.t, u)

  boundary = pre.ConsistencyBoundary(sigma_data, low)
  for check in _select(file, {
      "F": lambda: model.raw(w, given.image("x"), given.cond),
      "denoiser_D": lambda: denoise(pre.EDM(sigma_data)),
      "distiller_D": lambda: denoise(boundary),
  }, precision):
    yield loosened(check, precision)


def loosened(check: report.Check, precision: str) -> report.Check:
  """jcm divides by a root of 2 in float32, in float64 too."""
  if precision == "float32":
    return check
  return check._replace(limit=check.limit * files.ROUNDED / files.EXACT)


def ctm(file, precision):
  """CTM's networks: F, the denoiser g and the trajectory map G."""
  model = weights.model(file)
  w, given = model.weights(precision), Inputs(file, precision)
  y = model.labels(file)
  outer = trajectories.method(
      file, trajectory.TrajectoryDistillation, model
  ).coefficients
  # CTM returns the denoiser that G contains.
  inner = outer.denoiser
  x, xs, t, s = given.image("x"), given.image("xs"), given.t, given.s

  def f():
    seen = []
    model.map(w, inner, xs, t, s, y, seen=seen)
    return seen[0]

  def chain():
    jumps = files.jumps(file.notes)
    out = x * jumps[0][0]
    for a, b in jumps:
      out = model.map(
          w, outer, out, jnp.full_like(t, a), jnp.full_like(t, b), y
      )
    return out

  yield from _select(file, {
      "F": f,
      "g": lambda: model.map(w, inner, xs, t, s, y),
      "G": lambda: model.map(w, outer, xs, t, s, y),
      "g_tt": lambda: model.map(w, inner, xs, t, t, y),
      "G_tt": lambda: model.map(w, outer, xs, t, t, y),
      "chain": chain,
  }, precision)


def _from(*sources):
  def accepts(file):
    weighted = bool(file.group("state_dict/")) and (
        "constructor_main" not in file.meta  # Two networks: see samplers.
    )
    return weighted and file.source.endswith(sources)
  return accepts


RUNNERS = [
    (lambda f: _from("BCM-iCT-torch", "openai/consistency_models")(f)
     and not f.group("bcm_added/"), openai),
    (lambda f: bool(f.group("bcm_added/")), finetune_start),
    (_from("NVlabs/edm"), edm),
    (_from("NVlabs/edm2"), edm2_network),
    (_from("consistency_models_cifar10"), jcm),
    (_from("sony/ctm"), ctm),
]
