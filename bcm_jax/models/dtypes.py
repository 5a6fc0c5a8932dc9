"""Promotion of arrays to float32 or wider."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.typing.ArrayLike) -> jax.Array:
  """Casts to float32; float64 stays float64."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(jnp.float32, x.dtype))
