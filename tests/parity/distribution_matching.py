"""DMD2's losses at recorded levels, with the files' stand-in networks."""

import dataclasses
import re
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.methods import dmd
from bcm_jax.methods import edm
from bcm_jax.methods import gan
from bcm_jax.models import discriminator
from bcm_jax.models import layers
from tests import toys


class StandIn(nn.Module):
  """Network of the files: tanh(f W1 + b1) W2 + b2 + z W3.

  f is z, z shifted by one row and [c_noise, sin(4 c_noise), label].
  """

  two_time = False

  @nn.compact
  def __call__(
      self, z, c_noise, c_noise_end=None, labels=None, dropout_keys=None
  ):
    given = {name: self.param(name, lambda _: None)
             for name in ("W1", "b1", "W2", "b2", "W3")}
    rows = jnp.stack([c_noise, jnp.sin(4 * c_noise)], axis=-1)
    rows = jnp.concatenate([rows, labels.astype(z.dtype)], axis=-1)
    rows = jnp.broadcast_to(
        rows[:, None, None], (*z.shape[:3], rows.shape[-1])
    )
    f = jnp.concatenate([z, jnp.roll(z, 1, axis=1), rows], axis=-1)
    hidden = jnp.tanh(f @ given["W1"] + given["b1"])
    layers.sow_level(self, 0, hidden)
    return hidden @ given["W2"] + given["b2"] + z @ given["W3"]


class RecordedDiscriminator(gan.Discriminator):
  """With recorded levels, by the name of the stream."""

  recorded = None

  def levels(self, keys):
    return self.recorded[keys]


class Recorded(dmd.DistributionMatching):
  """With recorded levels, labels and start."""

  recorded = None

  def levels(self, ctx, stream, low, high):
    return self.recorded[f"{stream}/sigma"]

  def labels(self, ctx):
    return self.recorded["labels"]

  def generate(self, params, ctx, labels):
    start = self.sigma_max * self.recorded["z"]
    sigma = jnp.full(len(start), self.sigma_max, start.dtype)
    return self.denoiser.denoise(params, start, sigma, labels)

  @property
  def discriminator(self):
    cls = type("Bound", (RecordedDiscriminator,), {"recorded": self.recorded})
    given = super().discriminator
    return cls(**{
        f.name: getattr(given, f.name) for f in dataclasses.fields(given)
    })


def _head(file, precision):
  """The head's parameters, and its number of groups."""
  t = {k: jnp.asarray(v, precision)
       for k, v in file.group("state_dict/head/").items()}
  index = sorted({int(k.split(".")[0]) for k in t})
  names = [
      n for i in range((len(index) - 3) // 2) for n in (f"conv{i}", f"norm{i}")
  ] + ["last", "last_norm", "logit"]
  head = {}
  for i, name in zip(index, names, strict=True):
    weight, bias = t[f"{i}.weight"], t[f"{i}.bias"]
    if weight.ndim == 4:
      head[name] = {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}
    else:
      head[name] = {"scale": weight, "bias": bias}
  return {"level-1": head}


def _factor(file, pattern):
  return float(re.search(pattern + r" ?\+ ?([-+.e\d]+)\*", file.notes)[1])


def losses(file, precision):
  """The losses of generator and fake score, and their gradients."""
  meta = file.meta
  if meta["diffusion_gan_max_timestep"] != meta["num_train_timesteps"]:
    raise ValueError("diffusion_gan_max_timestep: no match for another range")
  low, high = meta["sigma_min"], meta["sigma_max"]
  rho = file.setting("rho", 7.0)
  sigmas = schedules.karras_sigmas(meta["num_train_timesteps"], low, high, rho)

  def array(name):
    value = file.image(name) if file[name].ndim == 4 else file[name]
    return jnp.asarray(value, precision)

  streams = {
      "dm": "dm", "fake": "fake", "generator": "gan_gen",
      "judge_real": "gan_real", "judge_fake": "gan_fake",
  }
  recorded = {
      f"{ours}/sigma": jnp.asarray(sigmas[file[f"in/t_{theirs}"]], precision)
      for ours, theirs in streams.items()
  } | {
      f"{ours}/noise": array(f"in/noise_{theirs}")
      for ours, theirs in streams.items()
  } | {"labels": array("in/labels"), "z": array("in/z")}
  nets = {
      name: {k: jnp.asarray(v, precision) for k, v in
             file.group(f"state_dict/{name}/").items()}
      for name in ("generator", "real", "fake")
  }
  fake = {"network": nets["fake"], "head": _head(file, precision)}
  ctx = toys.context(
      array("in/real"), labels=array("in/real_labels"),
      networks={"fake_score": fake, "student": nets["generator"]},
      frozen={"teacher": nets["real"]},
  )._replace(keys=lambda stream: stream)
  network, sigma_data = StandIn(), meta["sigma_data"]
  method = type("Bound", (Recorded,), {"recorded": recorded})(
      network, preconditioning="edm", sigma_data=sigma_data, sigma_min=low,
      sigma_max=high, rho=rho, regression_weight=0.0,
      teacher=edm.Diffusion(network, sigma_data=sigma_data),
      gan_weight=_factor(file, "loss_dm"),
      gan_fake_weight=_factor(file, "loss_fake"),
  )
  groups = int(re.search(r"GroupNorm (\d+) groups", meta["network"])[1])
  width = len(fake["head"]["level-1"]["last"]["bias"])
  with (
      mock.patch.object(
          process, "normal_like", lambda keys, _: recorded[keys]
      ),
      mock.patch.object(discriminator, "_MIN_GROUP_CHANNELS", width // groups),
  ):
    found = _outputs(method, nets, fake, ctx)
  for name, value in found.items():
    if name in file.outputs:
      # Tensors of a group are recorded with their channels first.
      grouped = "/" in name and value.ndim == 4
      value = jnp.moveaxis(value, -1, 1) if grouped else value
      yield file.check(name, value, precision)
  yield file.check("karras_sigmas", sigmas.astype(precision), precision)


def _outputs(method, nets, fake, ctx):
  """All outputs by their names, images with channels last."""
  labels = method.labels(ctx)
  x = method.generate(nets["generator"], ctx, labels)
  sigma, noise = (method.recorded[f"dm/{k}"] for k in ("sigma", "noise"))
  x_s = process.add_noise(x, sigma, noise)
  grad = method.gradient(ctx, x, labels)

  def generator(part):
    def loss(params):
      total, parts = method.student_loss(params, ctx)
      return jnp.mean(total if part is None else parts[part])
    return loss

  def guidance(params):
    return jnp.mean(method.fake_loss(params, ctx)[0])

  parts = method.student_loss(nets["generator"], ctx)[1]
  fake_parts = method.fake_loss(fake, ctx)[1]
  g = jax.grad(guidance)(fake)
  kernel = g["head"]["level-1"]["conv0"]["kernel"]
  return {
      "generated": x,
      "gen/loss_dm": jnp.mean(parts["loss_dm"]),
      "gen/gen_cls_loss": jnp.mean(parts["loss_gan"]),
      "gen/grad": grad,
      "gen/pred_real": method.teacher.denoise(nets["real"], x_s, sigma, labels),
      "gen/pred_fake": method.denoiser.denoise(
          nets["fake"], x_s, sigma, labels
      ),
      "gen/dLdm_dx": grad / grad.size,
      "gen/dLdm_dW1": jax.grad(generator("loss_dm"))(nets["generator"])["W1"],
      "gen/total_dW1": jax.grad(generator(None))(nets["generator"])["W1"],
      "guid/loss_fake_mean": jnp.mean(fake_parts["loss_denoising"]),
      "guid/guidance_cls_loss": jnp.mean(fake_parts["loss_gan"]),
      "guid/prob_real": jax.nn.sigmoid(fake_parts["logit_real"]),
      "guid/prob_fake": jax.nn.sigmoid(fake_parts["logit_fake"]),
      "guid/total_dfakeW1": g["network"]["W1"],
      "guid/total_dfakeW2": g["network"]["W2"],
      # [kh, kw, in, out]: the file has [out, in, kh, kw].
      "guid/total_dheadW": jnp.transpose(kernel, (3, 0, 1, 2)),
  }


RUNNERS = [
    (lambda f: f.source.endswith("DMD2") and f.has("gen/"), losses),
]
