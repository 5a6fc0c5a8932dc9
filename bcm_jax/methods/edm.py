"""Diffusion training: a denoiser D(x, sigma) ~ E[x_0 | x_0 + sigma z].

  L = w(sigma) |D(x_0 + sigma z, sigma) - x_0|^2,  w = 1 / c_out(sigma)^2

with ln sigma ~ N(p_mean, p_std^2) (EDM; Karras et al., 2022, table 1); with
EDM2's log-variance u(sigma) beside it, e^-u L + u (Karras et al., 2024).

The teacher of every distillation here is one of these.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.methods import base
from bcm_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Diffusion(base.SingleNetworkMethod):
  """The loss above; the defaults are EDM's.

  Attributes:
    network: F(x, c_noise, None, labels, dropout_keys).
    scalings: preconditioning of D, taken at end level 0.
    noise: conditioning value of a level, as the network expects it.
    sigma_data: standard deviation of images in [-1, 1].
    sigma_min, sigma_max, rho: grid of the samplers; training draws any level.
    p_mean, p_std: mean and deviation of ln sigma.
    label_dropout: share of the labels that training hides, so that the network
      can guide itself without a class.
    uncertainty: train EDM2's log-variance along; its network alone has one.
  """

  network: nn.Module
  scalings: preconditioning.Preconditioning
  noise: Callable[[jax.Array], jax.Array] = preconditioning.edm_noise
  sigma_data: float = 0.5
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  p_mean: float = -1.2
  p_std: float = 1.2
  label_dropout: float = 0.0
  uncertainty: bool = False

  # Its flow map is DDIM's step, to any level.
  takes_end_time = True
  is_denoiser = True
  averages: Mapping[str, base.Average] = dataclasses.field(
      default_factory=dict, init=False
  )

  def curriculum(self, step: int) -> dict[str, Any]:
    """Nothing changes with the step."""
    del step
    return {}

  def init(self, key, images, labels):
    """Fresh parameters for images [B, H, W, C] and labels [B] or None."""
    t = jnp.ones(images.shape[:1], jnp.float32)
    return self.network.init(key, images, t, None, labels)["params"]

  def denoise(
      self, params, x, sigma, labels, dropout_keys=None, augment_labels=None
  ) -> jax.Array:
    """D(x, sigma): x [B, H, W, C] at levels sigma [B] -> like x."""
    # Only networks with augment_dim take them.
    extra = () if augment_labels is None else (augment_labels,)

    def network(x, c_noise, c_noise_end):
      del c_noise_end
      return self.network.apply(
          {"params": params}, x, c_noise, None, labels, dropout_keys, *extra
      )

    return preconditioning.precondition(
        network, self.scalings, x, sigma, jnp.zeros_like(sigma), self.noise
    )

  def features(self, params, x, sigma, labels) -> list[jax.Array]:
    """Activations of the encoder at x, one tensor a resolution, fine first."""
    c_in = process.expand(self.scalings(sigma, jnp.zeros_like(sigma)).c_in, 4)
    _, sown = self.network.apply(
        {"params": params}, c_in * x, self.noise(sigma), None, labels,
        mutable=layers.FEATURES,
    )
    return layers.sown_levels(sown)

  def flow_map(self, params):
    """f(x, t, u, labels): DDIM's step of the ODE from level t to u."""

    def step(x, t, u, labels=None):
      ratio = process.expand(u / t, x.ndim)
      return ratio * x + (1 - ratio) * self.denoise(params, x, t, labels)

    return step

  def weight(self, sigma) -> jax.Array:
    """EDM's weight (sigma^2 + sd^2) / (sigma sd)^2: [B]."""
    return preconditioning.edm_weight(sigma, self.sigma_data)

  def lognormal_sigma(self, ctx: base.Context) -> jax.Array:
    """Draws a level for every example: [B]."""
    z = jax.vmap(jax.random.normal)(ctx.keys("t"))
    return jnp.exp(self.p_mean + self.p_std * z)

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """What mode inspect tells of the levels."""
    return {"sigma": self.lognormal_sigma(ctx)}

  def loss(self, params, ctx: base.Context):
    """L: per-example loss [B], a mean over pixels, and metrics."""
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
          {"params": params}, self.noise(sigma), method="logvar"
      )
      loss = loss * jnp.exp(-u) + u
    return loss, metrics
