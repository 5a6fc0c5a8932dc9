"""Embeddings of noise levels."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes


def sinusoidal_embedding(
    c_noise: jax.Array,
    dim: int,
    max_period: float = 10_000.0,
    endpoint: bool = False,
) -> jax.Array:
  """Sinusoidal embedding in ADM's order: cosines first, then sines.

  Frequencies are max_period^(-k / (dim // 2)), k = 0 .. dim // 2 - 1. The
  arguments reach about 1500 radians, so this is never computed below float32.

  Args:
    c_noise: [B] conditioning value of the noise level.
    dim: width; an odd width gets one zero column.
    endpoint: divide k by dim // 2 - 1, so that the last frequency is exactly
      1 / max_period (DDPM++).

  Returns:
    [B, dim], float32 or wider.
  """
  c_noise = dtypes.at_least_float32(c_noise)
  half = dim // 2
  last = half - 1 if endpoint else half
  frequencies = jnp.exp(
      -math.log(max_period) * jnp.arange(half, dtype=c_noise.dtype) / last
  )
  angles = c_noise[:, None] * frequencies[None]
  embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class Fourier(nn.Module):
  """Random Fourier features [B, dim]: cosines first, then sines.

  The frequencies are drawn once and never trained; they are parameters only so
  that a checkpoint carries them.

  Attributes:
    dim: width, even.
    scale: standard deviation of the frequencies.
  """

  dim: int
  scale: float = 16.0

  @nn.compact
  def __call__(self, c_noise: jax.Array) -> jax.Array:
    frequencies = jax.lax.stop_gradient(
        self.param(
            "freqs", nn.initializers.normal(self.scale), (self.dim // 2,)
        )
    )
    c_noise = dtypes.at_least_float32(c_noise)
    angles = 2 * math.pi * c_noise[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
