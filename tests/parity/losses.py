"""Losses an example, and the gradients that were recorded of them."""

from collections.abc import Callable, Mapping
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.methods import bcm
from bcm_jax.methods import cd
from bcm_jax.methods import consistency
from bcm_jax.methods import edm as diffusion
from bcm_jax.models import edm2
from tests import toys
from tests.parity import files
from tests.parity import report
from tests.parity import weights

_BOUNDARY = ("sigma_data", "sigma_min")


class AtLevels(diffusion.Diffusion):
  """Diffusion training at recorded levels."""

  recorded = None

  def lognormal_sigma(self, ctx):
    return self.recorded


def at_levels(sigma) -> type[diffusion.Diffusion]:
  """A class of diffusion training whose levels are these [B]."""
  return type("AtLevels", (AtLevels,), {"recorded": sigma})


class Batch:
  """What a loss is given, in one precision.

  Attributes:
    images, noise: [B, H, W, C].
    context: of the method, the target's weights as its average.
  """

  def __init__(self, file, precision, model, target=None):
    self.images, self.noise = (
        jnp.asarray(file.image(f"in/{k}"), precision)
        for k in ("x_start", "noise")
    )
    averages = {} if target is None else {"target": target}
    self.context = toys.context(
        self.images, None, model.labels(file), averages
    )

  def loss(self, method, params):
    """(loss [B], metrics), with the recorded noise in place of any."""
    with mock.patch.object(process, "normal_like", lambda *_: self.noise):
      return method.loss(params, self.context)


def _levels(file: files.Reference, precision, low, high, rho):
  """(t, r) of recorded indices of a descending grid, made in float64."""
  grid = schedules.karras_sigmas(
      int(file.meta["num_scales"]), low, high, rho
  )
  i = len(grid) - 1 - file["in/indices"]
  return jnp.asarray(grid[i], precision), jnp.asarray(grid[i - 1], precision)


def _gradients(file, precision, model, named: Mapping[str, Callable], params):
  """Checks recorded gradients of scalars by group.

  They were recorded in float32 alone. Ours are computed in float64, so that
  only the errors of the record count against the tolerance.
  """
  for group, scalar in named.items():
    if precision == "float64" and file.has(f"{group}/"):
      grad = model.named(jax.grad(scalar)(params))
      yield from file.tensors(group, grad, precision)


def bidirectional_loss(file, precision):
  """BCM's L_CT + L_ST at recorded indices."""
  model = weights.model(file)
  params = model.weights(precision)
  target = weights.model(file, "target_recipe").weights(precision)
  low, high, rho = (
      file.setting(k, v)
      for k, v in (("sigma_min", 0.002), ("sigma_max", 80.0), ("rho", 7.0))
  )
  grid = schedules.karras_sigmas(
      int(file.meta["num_scales"]), low, high, rho
  )
  i, j = file["in/indices"], file["in/t3_idx"]
  times = grid[i + 1], grid[i], grid[j]
  for name, level in zip(("in/t", "in/t2", "in/t3"), times, strict=True):
    yield report.Check(
        name, level.astype(precision), file[name].astype(np.float64),
        files.ROUNDED * np.abs(level),
    )
  sigma_data = file.setting("sigma_data", 0.5)
  cls = toys.at_times(bcm.BidirectionalTraining, *times)
  method = cls(
      model.compiled, model.noise, sigma_data=sigma_data,
      sigma_min=low, sigma_max=high, rho=rho, huber_c=file.setting("c", 0.06),
  )
  batch = Batch(file, precision, model, target)
  total, terms = batch.loss(method, params)
  recorded = {
      "loss_ct": terms["loss_ct"], "loss_soft": terms["loss_st"], "loss": total
  }
  for name, value in recorded.items():
    yield file.check(name, value, precision)

  def mean(term):
    return lambda p: jnp.mean(batch.loss(method, p)[1][term])

  yield from _gradients(file, precision, model, {
      "grad_loss_ct": mean("loss_ct"),
      "grad_loss_soft": mean("loss_st"),
      "grad_loss": lambda p: jnp.mean(batch.loss(method, p)[0]),
  }, params)


def _weighted(make, metric: str, weighting: str):
  """A method, or what it lacks."""
  method = make(metric=metric, weighting=weighting)
  one = jnp.ones(1)
  try:
    method.weight(one, one)
    method.distance(one[None], one[None], None)
  except KeyError as error:
    return None, f"methods.consistency has no metric or weighting {error}"
  return method, None


def openai_losses(file, precision):
  """OpenAI's consistency_losses: training of consistency models."""
  model = weights.model(file)
  params = model.weights(precision)
  target = weights.model(file, "target_recipe").weights(precision)
  sigma_data = file.setting("sigma_data", 0.5)
  low, high, rho = (
      file.setting(k, v)
      for k, v in (("sigma_min", 0.002), ("sigma_max", 80.0), ("rho", 7.0))
  )
  times = _levels(file, precision, low, high, rho)
  batch = Batch(file, precision, model, target)

  def make(**options):
    cls = toys.at_times(consistency.ConsistencyTraining, *times)
    return cls(
        model.compiled, model.noise,
        sigma_data=sigma_data, sigma_min=low, **options,
    )

  distil = _distillation(file, precision, model, times, batch, low)
  for name in file.outputs:
    kind = {"loss_ct": make, "loss_cd": distil}.get(name[:7])
    if kind is not None:
      method, lack = _weighted(kind, *name.split("_", 3)[2:])
      if method is None:
        yield report.Missing(name, lack)
      else:
        yield file.check(name, batch.loss(method, params)[0], precision)
  plain = {"metric": "l2", "weighting": "uniform"}
  yield from _gradients(file, precision, model, {
      "grad_ct": lambda p: jnp.mean(batch.loss(make(**plain), p)[0]),
      "grad_cd": lambda p: jnp.mean(batch.loss(distil(**plain), p)[0]),
  }, params)
  yield from _denoising(file, precision, model, batch, params)


def _distillation(
    file, precision, model, times, batch, low, recipe="teacher_recipe"
):
  """Maker of the distillation at recorded times; gives the batch a teacher."""
  sigma_data = file.setting("sigma_data", file.setting("data_std", 0.5))
  teacher = diffusion.Diffusion(
      model.compiled, model.noise, sigma_data=sigma_data
  )
  frozen = weights.model(file, recipe).weights(precision)
  batch.context = batch.context._replace(frozen={"teacher": frozen})

  def make(**options):
    cls = toys.at_times(cd.ConsistencyDistillation, *times)
    return cls(
        model.compiled, model.noise, "cm", teacher=teacher,
        sigma_data=sigma_data, sigma_min=low, **options,
    )

  return make


def _denoising(file, precision, model, batch, params):
  """Diffusion training by the same code, with and without its weight."""
  if "edm_mse" not in file.outputs:
    return
  sigma = jnp.asarray(file["in/edm_sigmas"], precision)
  sigma_data = file.setting("sigma_data", 0.5)
  method = at_levels(sigma)(
      model.compiled, model.noise, sigma_data=sigma_data
  )
  loss = batch.loss(method, params)[0]
  for name, value in (
      ("edm_mse", loss), ("edm_xs_mse", loss / method.weight(sigma))
  ):
    yield file.check(name, value, precision, files.ROUNDED)


def ect(file, precision):
  """ECT's t -> r and its loss, with either preconditioning."""
  model = weights.model(file)
  params = model.weights(precision)
  batch = Batch(file, precision, model)
  sigma_data = file.setting("sigma_data", 0.5)
  low = file.setting("sigma_min", 0.002)
  z = jnp.asarray(file["in/rnd_normal"].reshape(-1), precision)
  t = jnp.exp(file.setting("P_mean", -1.1) + file.setting("P_std", 2.0) * z)
  forms = {"eval": "cm", "train": "edm"}

  def earlier(t, config, stage):
    k = {"const": 0.0, "sigmoid": config.get("k", 8.0)}[config["adj"]]
    ratio = schedules.ect_gap_ratio(stage, 1, config["q"])
    return schedules.ect_earlier_time(t, ratio, k, config.get("b", 1.0))

  def method(config, stage, form):
    r = earlier(t, config, stage)
    cls = toys.at_times(consistency.ConsistencyTraining, t, r)
    options = consistency.ECT.options | dict(
        huber_c=config["c"], preconditioning=form
    )
    return cls(
        model.compiled, model.noise, sigma_data=sigma_data, sigma_min=low,
        **options,
    )

  times = jnp.asarray(file["in/t"].reshape(-1), precision)
  for i, config in enumerate(file.meta["loss_configs"]):
    for name in file.outputs:
      kind, _, rest = name.partition(f"_cfg{i}_stage")
      stage, _, mode = rest.partition("_")
      if not rest:
        continue
      if kind == "r":
        value = earlier(times, config, int(stage))
      else:
        value, _ = batch.loss(method(config, int(stage), forms[mode]), params)
      yield file.check(name, value, precision)
    at = int(file.setting("at stage", 2))
    trained = method(config, at, forms["train"])
    yield from _gradients(file, precision, model, {
        f"grad_cfg{i}": lambda p, m=trained: jnp.mean(batch.loss(m, p)[0]),
    }, params)


def jcm_losses(file, precision):
  """Training losses of OpenAI's CIFAR-10 code, averaged over the batch.

  With the image itself for the denoiser Heun's step is Euler's: both land on
  x_0 + r z.
  """
  model = weights.model(file)
  params = model.weights(precision)
  target = weights.model(file, "target_recipe").weights(precision)
  sigma_data, low, high, rho = (
      file.setting(k, v) for k, v in (
          ("data_std", 0.5), ("t_min", 0.002), ("t_max", 80.0), ("rho", 7.0)
      )
  )
  times = _levels(file, precision, low, high, rho)
  batch = Batch(file, precision, model, target)

  def make(**options):
    cls = toys.at_times(consistency.ConsistencyTraining, *times)
    return cls(
        model.compiled, model.noise, "cm", sigma_data, low, **options,
    )

  def mean(method):
    return lambda p: jnp.mean(batch.loss(method, p)[0])

  # The teacher is the target network here.
  distil = _distillation(
      file, precision, model, times, batch, low, "target_recipe"
  )
  for name in file.outputs:
    weighting = name.rpartition("_")[2].replace("snrp1", "snr+1")
    kind = {"loss_ct": make, "loss_cd": distil}.get(name[:7])
    if kind is not None:
      method, lack = _weighted(kind, "l2", weighting)
      if method is None:
        yield report.Missing(name, lack)
        continue
      yield file.check(name, mean(method)(params), precision, files.ROUNDED)
  plain = mean(make(metric="l2", weighting="uniform"))
  yield from _gradients(file, precision, model, {
      "grad_ct_heun": plain, "grad_ct_euler": plain,
  }, params)


def _squares(method, params, batch, sigma):
  """The loss by pixel, as EDM writes it down."""
  ctx = batch.context
  d = method.denoise(
      params, process.add_noise(batch.images, sigma, batch.noise), sigma,
      ctx.labels,
  )
  weight = process.expand(method.weight(sigma), d.ndim)
  squares = weight * jnp.square(d - batch.images)
  if method.uncertainty:
    u = method.network.apply(
        {"params": params}, method.c_noise(sigma), method="logvar"
    )
    u = process.expand(u, d.ndim)
    squares = squares / jnp.exp(u) + u
  return squares


def edm(file, precision):
  """EDM's loss, and EDM2's with its log-variance."""
  model = weights.model(file)
  params = model.weights(precision)
  second = file.source.endswith("edm2")
  mean, std = (-0.4, 1.0) if second else (-1.2, 1.2)
  z = jnp.asarray(file["in/rnd_normal"].reshape(-1), precision)
  sigma = jnp.exp(mean + std * z)
  sigma_data = file.setting("sigma_data", 0.5)
  method = at_levels(sigma)(
      model.compiled, model.noise, sigma_data=sigma_data, uncertainty=second
  )
  batch = Batch(file, precision, model)
  outputs = {"loss_map": params}
  if second:
    outputs["loss_map_trainmode"] = edm2.normalize_weights(params)
  for name, tree in outputs.items():
    if name in file.outputs:
      squares = _squares(method, tree, batch, sigma)
      yield file.check(name, squares, precision)
      # The loss itself is their mean.
      yield report.Check(
          f"{name} mean", batch.loss(method, tree)[0],
          np.asarray(squares, np.float64).mean((1, 2, 3)),
          1e-5 if precision == "float32" else 1e-9,
      )
  pixels = batch.images[0].size
  yield from _gradients(file, precision, model, {
      "grad_loss": lambda p: pixels * jnp.mean(batch.loss(method, p)[0]),
  }, params)


def _edm_file(file):
  return file.source.endswith(("NVlabs/edm", "NVlabs/edm2")) and any(
      name.startswith("loss_map") for name in file.outputs
  )


def _bound(file):
  return "in/indices" in file and "in/x_start" in file


RUNNERS = [
    (_edm_file, edm),
    (lambda f: _bound(f) and "in/t3_idx" in f, bidirectional_loss),
    (lambda f: _bound(f) and f.source.endswith("openai/consistency_models"),
     openai_losses),
    (lambda f: "loss_configs" in f.meta, ect),
    (lambda f: _bound(f) and f.source.endswith("consistency_models_cifar10"),
     jcm_losses),
]
