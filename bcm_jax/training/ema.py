"""Moving averages of parameters."""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def update(average: Tree, params: Tree, rate: jax.Array | float) -> Tree:
  """rate * average + (1 - rate) * params, in the averages' own dtype.

  Written as average + (1 - rate) (params - average), which keeps constant
  parameters constant to the last bit.
  """
  def one(a, p):
    return a + (1 - jnp.asarray(rate, a.dtype)) * (p.astype(a.dtype) - a)

  return jax.tree.map(one, average, params)


def start(params: Tree) -> Tree:
  """A first average: the parameters themselves, in float32 or wider."""
  return jax.tree.map(
      lambda p: jnp.array(p, jnp.promote_types(jnp.float32, p.dtype)), params
  )


def warmed_rate(rate: float, updates: jax.Array) -> jax.Array:
  """min(rate, (1 + n) / (10 + n)) at the n-th update.

  Forgets the random start early in a short run; the published runs do without.
  """
  n = updates.astype(jnp.float32)
  return jnp.minimum(rate, (1 + n) / (10 + n))
