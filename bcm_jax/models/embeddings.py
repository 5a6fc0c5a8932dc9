"""Embeddings of noise levels."""

import math

import jax
import jax.numpy as jnp


def sinusoidal_embedding(
    c_noise: jax.Array, dim: int, max_period: float = 10_000.0
) -> jax.Array:
  """Sinusoidal embedding in ADM's order: cosines first, then sines.

  Frequencies are max_period^(-k / (dim // 2)), k = 0 .. dim // 2 - 1. The
  arguments reach about 1500 radians, so this is never computed below float32.

  Args:
    c_noise: [B] conditioning value of the noise level.
    dim: width; an odd width gets one zero column.

  Returns:
    [B, dim], float32 or wider.
  """
  dtype = jnp.promote_types(jnp.float32, c_noise.dtype)
  half = dim // 2
  frequencies = jnp.exp(
      -math.log(max_period) * jnp.arange(half, dtype=dtype) / half
  )
  angles = c_noise.astype(dtype)[:, None] * frequencies[None]
  embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
