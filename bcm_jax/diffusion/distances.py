"""Distances between images, one number an example."""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

# As the package `lpips` has it.
_EPSILON = 1e-10
Distance = Callable[[jax.Array, jax.Array], jax.Array]


def _flat(a: jax.Array, b: jax.Array) -> jax.Array:
  d = dtypes.at_least_float32(a) - dtypes.at_least_float32(b)
  return d.reshape(d.shape[0], -1)


def l2(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean of squared differences: [B, ...] twice -> [B]."""
  return jnp.mean(_flat(a, b) ** 2, axis=-1)


def l1(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean of absolute differences: [B, ...] twice -> [B]."""
  return jnp.mean(jnp.abs(_flat(a, b)), axis=-1)


def pseudo_huber(
    a: jax.Array, b: jax.Array, c: float, normalise: bool = True
) -> jax.Array:
  """sqrt(|a - b|^2 + c^2) - c, over sqrt(D) if normalised.

  Song & Dhariwal (iCT, 2023), eq. 8; the division by the root of the number
  of elements D is in Li & He's code alone. Written as S / (sqrt(S + c^2) + c),
  S = |a - b|^2, which neither cancels for a near b nor has an infinite slope
  at a = b (where c > 0).

  Args:
    a, b: [B, ...].
    c: width of the quadratic part, in units of |a - b|; 0 is the L2 norm.
    normalise: divide by sqrt(D).

  Returns:
    [B].
  """
  d = _flat(a, b)
  s = jnp.sum(d**2, axis=-1)
  if c == 0.0:
    # The root of 0 has no gradient; this gives it gradient zero.
    safe = jnp.where(s > 0, s, 1)
    value = jnp.where(s > 0, jnp.sqrt(safe), 0)
  else:
    value = s / (jnp.sqrt(s + c**2) + c)
  return value / math.sqrt(d.shape[-1]) if normalise else value


def unit(features: jax.Array) -> jax.Array:
  """Features [..., C] of unit length over C; a vector of zeros stays zero."""
  squared = jnp.sum(features**2, axis=-1, keepdims=True)
  # The root has no gradient at 0, where ReLUs often put whole vectors.
  positive = squared > 0
  norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
  return features / (norm + _EPSILON)


def of_features(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
  """Squared distance of unit features, summed over channels and levels.

  Args:
    a, b: features [B, H, W, C] of several levels.

  Returns:
    [B], means over positions.
  """
  total = 0.0
  for x, y in zip(a, b, strict=True):
    d = unit(dtypes.at_least_float32(x)) - unit(dtypes.at_least_float32(y))
    total += jnp.sum(d**2, axis=-1).mean(axis=(1, 2))
  return total


def by_name(
    metric: str, a: jax.Array, b: jax.Array, huber_c: float | None,
    normalise: bool = True,
) -> jax.Array:
  """A distance [B] by its name: 'l2', 'l1' or 'pseudo_huber'.

  huber_c None is iCT's constant; normalise as in pseudo_huber.
  """
  if metric == "pseudo_huber":
    c = huber_constant(a[0].size) if huber_c is None else huber_c
    return pseudo_huber(a, b, c, normalise)
  return {"l2": l2, "l1": l1}[metric](a, b)


def huber_constant(num_elements: int) -> float:
  """iCT's c = 0.00054 sqrt(D) (Song & Dhariwal, 2023, section 3.3)."""
  return 0.00054 * math.sqrt(num_elements)
