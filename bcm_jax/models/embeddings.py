"""Noise level embeddings."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

# Names of parameters that are constants: they are in the parameters only so
# that checkpoints contain them, and no update changes them.
CONSTANTS = ("freqs", "phases")


def sinusoidal_embedding(
    c_noise: jax.Array,
    dim: int,
    max_period: float = 10_000.0,
    endpoint: bool = False,
) -> jax.Array:
  """Computes the sinusoidal embedding in ADM's order: cosines, then sines.

  The frequencies are max_period^(-k / (dim // 2)), k = 0 .. dim // 2 - 1. The
  angles reach about 1500 radians and need at least float32.

  Args:
    c_noise: [B] noise conditioning.
    dim: embedding size; an odd size is padded with one zero.
    max_period: inverse of the lowest frequency.
    endpoint: divide k by dim // 2 - 1, so that the last frequency is exactly
      1 / max_period (DDPM++).

  Returns:
    [B, dim], at least float32.
  """
  c_noise = dtypes.at_least_float32(c_noise)
  half = dim // 2
  divisor = half - 1 if endpoint else half
  frequencies = jnp.exp(
      -math.log(max_period) * jnp.arange(half, dtype=c_noise.dtype) / divisor
  )
  angles = c_noise[:, None] * frequencies[None]
  embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class Fourier(nn.Module):
  """Random Fourier features [B, dim]: cosines, then sines.

  The frequencies are constants, see CONSTANTS.

  Attributes:
    dim: embedding size, even.
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
