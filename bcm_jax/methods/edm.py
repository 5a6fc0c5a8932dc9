"""Denoising diffusion (EDM; Karras et al., 2022): D(x, sigma) ~ E[x_0 | x].

  L = w(sigma) |D(x_0 + sigma z, sigma) - x_0|^2,  w = 1 / c_out(sigma)^2

with x = x_0 + sigma z and ln sigma ~ N(p_mean, p_std^2) (eq. 7 and 8, table 1).
With the log-variance u(sigma) of EDM2 (Karras et al., 2024) the loss is
e^-u L + u. As in the released code, squares are averaged over pixels.

The teacher of every distillation method is a network of this method.
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
  """The loss of the module docstring; the defaults are those of EDM.

  Attributes:
    sigma_min: lowest level of the samplers; training has no bounds.
    sigma_max: highest level of the samplers.
    rho: exponent of the samplers' Karras grid.
    p_mean: mean of ln sigma.
    p_std: standard deviation of ln sigma.
    label_dropout: fraction of labels that training replaces by "no class", for
      classifier-free guidance.
    uncertainty: whether to train EDM2's log-variance u(sigma), for model.name
      'edm2'.
  """

  preconditioning: base.PreconditioningName = "edm"
  p_mean: float = -1.2
  p_std: float = 1.2
  label_dropout: float = 0.0
  uncertainty: bool = False

  title = "denoising diffusion model"
  paper = "Karras et al., 2022"
  takes_end_time = True  # The flow map is a DDIM step to any level.
  is_denoiser = True
  rounding = "nearest"

  @classmethod
  def constraints(cls, config):
    """Checks that the network has no end level."""
    return needs_one_time(config)

  def denoise(
      self, params, x, sigma, labels, dropout_keys=None, augment_labels=None
  ) -> jax.Array:
    """Returns D(x, sigma): x [B, H, W, C] at levels sigma [B]."""
    return self.f(
        params, x, sigma, jnp.zeros_like(sigma), labels, dropout_keys,
        augment_labels,
    )

  def solver_denoiser(self, params, labels, augment_labels=None):
    """Returns D(x, s) for solvers, with s [B, 1, 1, 1]."""
    return lambda x, s: self.denoise(
        params, x, s.reshape(-1), labels, augment_labels=augment_labels
    )

  def features(
      self, params, x, sigma, labels, augment_labels=None
  ) -> list[jax.Array]:
    """Returns features of the encoder, [B, H, W, C] per resolution.

    Args:
      params: parameters of the network.
      x: [B, H, W, C] at levels sigma.
      sigma: [B].
      labels: [B] int32 or None.
      augment_labels: [B, 9] or None.

    Returns:
      Feature maps, fine to coarse.
    """
    c_in = self.coefficients(sigma, jnp.zeros_like(sigma)).c_in
    # Only networks with augment_dim have this argument.
    extra = () if augment_labels is None else (None, augment_labels)
    _, sown = self.network.apply(
        {"params": params}, process.expand(c_in, 4) * x, self.c_noise(sigma),
        None, labels, *extra, mutable=layers.FEATURES,
    )
    return layers.sown_levels(sown)

  def flow_map(self, params):
    """Returns f(x, t, u, labels): a DDIM (Euler) step from levels t to u."""

    def step(x, t, u, labels=None):
      ratio = process.expand(u / t, x.ndim)
      return ratio * x + (1 - ratio) * self.denoise(params, x, t, labels)

    return step

  def weight(self, sigma) -> jax.Array:
    """Returns lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 [B] (table 1)."""
    return preconditioning.edm_weight(sigma, self.sigma_data)

  def lognormal_sigma(self, ctx: base.Context) -> jax.Array:
    """Draws log-normal noise levels [B] (table 1)."""
    z = jax.vmap(jax.random.normal)(ctx.keys("t"))
    return jnp.exp(self.p_mean + self.p_std * z)

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """Draws noise levels by name, for the report of mode inspect."""
    return {"sigma": self.lognormal_sigma(ctx)}

  def loss(self, params, ctx: base.Context):
    """Returns the denoising loss [B] and metrics."""
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
  """Checks that a network has no end level; returns an error text or None."""
  if not config.model.get("two_time"):
    return None
  return (
      "model.two_time: got True, expected a network without end level for "
      f"method.name={config.method.name!r}; set model.two_time=False"
  )
