"""Promotion of arrays to float32 or wider, and a square root for norms."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.typing.ArrayLike) -> jax.Array:
  """Casts to float32; float64 stays float64."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def safe_sqrt(x: jax.Array) -> jax.Array:
  """Computes sqrt(x) for x >= 0, with derivative 0 instead of inf at x = 0.

  The derivative of a norm at 0 is then 0 instead of NaN (0 times inf).
  """
  zero = x == 0
  return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))
