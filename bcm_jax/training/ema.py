"""Exponential moving averages (EMA) of parameters."""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def update(average: Tree, params: Tree, rate: jax.Array | float) -> Tree:
  """Computes rate * average + (1 - rate) * params, in the average's dtype.

  Evaluated as average + (1 - rate) (params - average): where the parameters
  equal the average, the result is bit-identical to it.

  Args:
    average: tree of arrays.
    params: tree of the same structure and shapes.
    rate: decay rate in [0, 1], a scalar.

  Returns:
    The updated average.
  """
  def update_leaf(a, p):
    return a + (1 - jnp.asarray(rate, a.dtype)) * (p.astype(a.dtype) - a)

  return jax.tree.map(update_leaf, average, params)


def start(params: Tree) -> Tree:
  """Returns the initial average: a copy of params, in float32 or wider."""
  return jax.tree.map(
      lambda p: jnp.array(p, jnp.promote_types(jnp.float32, p.dtype)), params
  )


def warmed_rate(rate: float, updates: jax.Array) -> jax.Array:
  """Returns min(rate, (1 + n) / (10 + n)) at update n, a float32 scalar.

  The warm-up of TensorFlow's ExponentialMovingAverage(num_updates=n): in a
  short run it removes the random initialization early. The published runs do
  not use it.
  """
  n = updates.astype(jnp.float32)
  return jnp.minimum(rate, (1 + n) / (10 + n))
