"""Distances between images, one value per example."""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

# The epsilon of the Python package `lpips`.
_EPSILON = 1e-10
Distance = Callable[[jax.Array, jax.Array], jax.Array]


def _flat(a: jax.Array, b: jax.Array) -> jax.Array:
  d = dtypes.at_least_float32(a) - dtypes.at_least_float32(b)
  return d.reshape(d.shape[0], -1)


def l2(a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes the mean squared difference [B] of a and b [B, ...]."""
  return jnp.mean(_flat(a, b) ** 2, axis=-1)


def l1(a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes the mean absolute difference [B] of a and b [B, ...]."""
  return jnp.mean(jnp.abs(_flat(a, b)), axis=-1)


def pseudo_huber(
    a: jax.Array, b: jax.Array, c: float, normalize: bool = True
) -> jax.Array:
  """Computes the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c.

  Song & Dhariwal (iCT, 2023), eq. 8. The factor 1 / sqrt(D), D the number of
  elements per example, is not in the paper; it is in the code of Li & He (BCM,
  2024). Evaluated as S / (sqrt(S + c^2) + c) with S = |a - b|^2, which avoids
  cancellation for a close to b and has a finite gradient at a = b for c > 0.

  Args:
    a, b: [B, ...].
    c: width of the quadratic region, in units of |a - b|; 0 gives the L2 norm.
    normalize: divide by sqrt(D).

  Returns:
    [B].
  """
  d = _flat(a, b)
  s = jnp.sum(d**2, axis=-1)
  if c == 0.0:
    value = dtypes.safe_sqrt(s)
  else:
    value = s / (jnp.sqrt(s + c**2) + c)
  return value / math.sqrt(d.shape[-1]) if normalize else value


def unit(features: jax.Array) -> jax.Array:
  """Scales features [..., C] to unit norm over C; zero vectors stay zero."""
  # ReLU outputs are often all zero.
  norm = dtypes.safe_sqrt(jnp.sum(features**2, axis=-1, keepdims=True))
  return features / (norm + _EPSILON)


def of_features(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
  """Computes the squared distance of unit-normalized features.

  LPIPS without learned weights (Zhang et al., 2018, eq. 1): the sum over
  channels and levels of the mean over positions.

  Args:
    a, b: features [B, H, W, C] of each level.

  Returns:
    [B].
  """
  total = 0.0
  for x, y in zip(a, b, strict=True):
    d = unit(dtypes.at_least_float32(x)) - unit(dtypes.at_least_float32(y))
    total += jnp.sum(d**2, axis=-1).mean(axis=(1, 2))
  return total


def by_name(
    metric: str, a: jax.Array, b: jax.Array, huber_c: float | None,
    normalize: bool = True,
) -> jax.Array:
  """Computes a distance by name.

  Args:
    metric: 'l2', 'l1' or 'pseudo_huber'.
    a, b: [B, ...].
    huber_c: constant of pseudo_huber; None uses that of iCT.
    normalize: see `pseudo_huber`.

  Returns:
    [B].
  """
  if metric == "pseudo_huber":
    c = huber_constant(a[0].size) if huber_c is None else huber_c
    return pseudo_huber(a, b, c, normalize)
  return {"l2": l2, "l1": l1}[metric](a, b)


def huber_constant(num_elements: int) -> float:
  """Returns iCT's c = 0.00054 sqrt(D) (Song & Dhariwal, 2023, section 3.3)."""
  return 0.00054 * math.sqrt(num_elements)
