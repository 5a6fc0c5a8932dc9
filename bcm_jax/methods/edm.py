"""Diffusion training: a denoiser D(x, sigma) ~ E[x_0 | x_0 + sigma z].

  L = w(sigma) |D(x_0 + sigma z, sigma) - x_0|^2,  w = 1 / c_out(sigma)^2

with ln sigma ~ N(p_mean, p_std^2): Karras et al. (EDM, 2022), eq. 7 and 8 and
table 1. With EDM2's log-variance u(sigma) it is e^-u L + u (Karras et al.,
2024). As in the released code, the squares are averaged over pixels.

A network of it is the teacher of every distillation here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.methods import base
from bcm_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Diffusion(base.PreconditionedNetwork, base.SingleNetworkMethod):
  """The loss above; the defaults are EDM's.

  Attributes:
    sigma_min, sigma_max, rho: grid of the samplers; training draws any level.
    p_mean, p_std: mean and standard deviation of ln sigma.
    label_dropout: fraction of labels that training hides, so that the network
      can guide itself without a class.
    uncertainty: train EDM2's log-variance too; only that network has one.
  """

  preconditioning: base.PreconditioningName = "edm"
  p_mean: float = -1.2
  p_std: float = 1.2
  label_dropout: float = 0.0
  uncertainty: bool = False

  title = "denoising diffusion model"
  paper = "Karras et al., 2022"
  takes_end_time = True  # Its flow map is DDIM's step, to any level.
  is_denoiser = True

  @classmethod
  def constraints(cls, config):
    """Returns why the network is no denoiser, or None."""
    return needs_one_time(config)

  def denoise(
      self, params, x, sigma, labels, dropout_keys=None, augment_labels=None
  ) -> jax.Array:
    """Returns D(x, sigma): x [B, H, W, C] at levels sigma [B]."""
    return self.f(
        params, x, sigma, jnp.zeros_like(sigma), labels, dropout_keys,
        augment_labels,
    )

  def solver_denoiser(self, params, labels):
    """Returns D(x, s) for solvers, with s [B, 1, 1, 1]."""
    return lambda x, s: self.denoise(params, x, s.reshape(-1), labels)

  def features(self, params, x, sigma, labels) -> list[jax.Array]:
    """Returns activations of the encoder at x, one tensor per resolution,
    fine to coarse."""
    c_in = self.coefficients(sigma, jnp.zeros_like(sigma)).c_in
    _, sown = self.network.apply(
        {"params": params}, process.expand(c_in, 4) * x, self.c_noise(sigma),
        None, labels, mutable=layers.FEATURES,
    )
    return layers.sown_levels(sown)

  def flow_map(self, params):
    """Returns f(x, t, u, labels): DDIM's step of the ODE from level t to u."""

    def step(x, t, u, labels=None):
      ratio = process.expand(u / t, x.ndim)
      return ratio * x + (1 - ratio) * self.denoise(params, x, t, labels)

    return step

  def weight(self, sigma) -> jax.Array:
    """Returns (sigma^2 + sd^2) / (sigma sd)^2 [B], lambda of table 1."""
    return preconditioning.edm_weight(sigma, self.sigma_data)

  def lognormal_sigma(self, ctx: base.Context) -> jax.Array:
    """Draws a level for every example (table 1, training): [B]."""
    z = jax.vmap(jax.random.normal)(ctx.keys("t"))
    return jnp.exp(self.p_mean + self.p_std * z)

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """Draws the levels that mode inspect shows."""
    return {"sigma": self.lognormal_sigma(ctx)}

  def loss(self, params, ctx: base.Context):
    """Returns L [B], a mean over pixels, and metrics."""
    sigma = self.lognormal_sigma(ctx)
    labels = ctx.labels
    if labels is not None and self.label_dropout:
      hidden = jax.vmap(jax.random.uniform)(ctx.keys("label_dropout"))
      labels = jnp.where(hidden < self.label_dropout, -1, labels)
    z = process.normal_like(ctx.keys("noise"), ctx.images)
    d = self.denoise(
        params, process.add_noise(ctx.images, sigma, z), sigma, labels,
        ctx.keys("dropout"), ctx.augment_labels,
    )
    loss = self.weight(sigma) * distances.l2(d, ctx.images)
    metrics = {"loss_denoising": loss}
    if self.uncertainty:
      u = self.network.apply(
          {"params": params}, self.c_noise(sigma), method="logvar"
      )
      loss = loss * jnp.exp(-u) + u
    return loss, metrics


def needs_one_time(config) -> str | None:
  """Returns why the network of a config is no denoiser, or None."""
  if not config.model.get("two_time"):
    return None
  return (
      f"method.name={config.method.name!r} trains a denoiser, which takes no "
      "end level; set model.two_time=False"
  )
