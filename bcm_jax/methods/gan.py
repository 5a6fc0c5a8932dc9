"""A discriminator on features of a diffusion network, and its losses.

Images are augmented and noised to a random low level (Wang et al., 2023,
Diffusion-GAN), a denoiser's encoder turns them into features, and trained heads
into logits. No network of ImageNet takes part unless a user brings it
(projected), so what is measured with such features later was not trained on.
One discriminator serves all devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.methods import base
from bcm_jax.methods import diff_augment
from bcm_jax.methods import edm
from bcm_jax.methods import projected
from bcm_jax.models import discriminator


@dataclasses.dataclass(frozen=True)
class Discriminator:
  """Logits of images.

  Attributes:
    encoder: gives the features: a denoiser, or projected.Projected.
    heads: the trained part.
    sigma_max: highest level of the noise; levels are uniform in
      sigma^(1 / rho). None leaves images as they are.
    augment: whether images go through DiffAugment first.
  """

  encoder: edm.Diffusion | projected.Projected
  heads: discriminator.Heads
  sigma_max: float | None = 80.0
  augment: bool = True

  def init(self, key, images, labels):
    """Fresh parameters of the heads."""
    sigma = jnp.ones(images.shape[:1], jnp.float32)

    def features():
      params = self.encoder.init(key, images, labels)
      return self.encoder.features(params, images, sigma, labels)

    shapes = jax.eval_shape(features)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
    return self.heads.init(key, zeros)["params"]

  def __call__(
      self, params, frozen: Any, images, labels, ctx: base.Context, stream: str
  ) -> jax.Array:
    """Logits [B, heads] of images [B, H, W, C].

    Args:
      params: of the heads.
      frozen: parameters of the encoder, or of a network like it.
      images: in [-1, 1].
      labels: [B] or None.
      ctx: gives keys.
      stream: name of its draws; real and generated images take their own.
    """
    if self.augment:
      images = diff_augment.augment(images, ctx.keys(f"{stream}/augment"))
    sigma = None
    if self.sigma_max is not None:
      sigma = self.levels(ctx.keys(f"{stream}/sigma"))
      z = process.normal_like(ctx.keys(f"{stream}/noise"), images)
      images = process.add_noise(images, sigma, z)
    features = self.encoder.features(frozen, images, sigma, labels)
    return self.heads.apply({"params": params}, features)

  def levels(self, keys) -> jax.Array:
    """Levels [B] between the denoiser's sigma_min and sigma_max."""
    rho = self.encoder.rho
    low, high = (
        s ** (1 / rho) for s in (self.encoder.sigma_min, self.sigma_max)
    )
    return (low + (high - low) * jax.vmap(jax.random.uniform)(keys)) ** rho


def _mean(logits: jax.Array) -> jax.Array:
  return jnp.mean(logits, axis=-1)


def hinge_generator(fake: jax.Array) -> jax.Array:
  """-logit, a mean over heads: [B, heads] -> [B]."""
  return -_mean(fake)


def hinge_discriminator(fake: jax.Array, real: jax.Array) -> jax.Array:
  """max(0, 1 + fake) + max(0, 1 - real): [B, heads] twice -> [B]."""
  return _mean(jax.nn.relu(1 + fake)) + _mean(jax.nn.relu(1 - real))


def softplus_generator(fake: jax.Array) -> jax.Array:
  """-log sigmoid(logit), the loss that does not saturate: [B]."""
  return _mean(jax.nn.softplus(-fake))


def softplus_discriminator(fake: jax.Array, real: jax.Array) -> jax.Array:
  """-log(1 - sigmoid(fake)) - log sigmoid(real): [B]."""
  return _mean(jax.nn.softplus(fake)) + _mean(jax.nn.softplus(-real))


