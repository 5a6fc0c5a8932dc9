"""Streaming mean and covariance of features in float64.

Stored as the mean and the scatter matrix around it, and merged by the update of
Chan, Golub and LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances". Raw sums of squares, as in most evaluators, lose
precision when the mean is large compared with the standard deviation.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax.errors import UserError

# Rows converted to float64 at a time: 64 MiB at 2048 features. Every block adds
# a D x D matrix, so small blocks are slow.
BLOCK_SIZE = 4096


class Gaussian(NamedTuple):
  """Mean and covariance of features, the arguments of a Frechet distance.

  Attributes:
    mean: float64 [D].
    covariance: float64 [D, D].
  """

  mean: np.ndarray
  covariance: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Count, mean and scatter of the rows seen so far; immutable.

  Attributes:
    count: number of rows.
    mean: float64 [D].
    scatter: float64 [D, D], the sum of (x - mean) (x - mean)^T.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  def update(self, block: np.ndarray) -> "Moments":
    """Returns the moments with the rows of a block added.

    Args:
      block: float32 or float64 [n, D], n >= 0.

    Returns:
      Moments of all rows; up to rounding independent of the order of the rows
      and of the block size.

    Raises:
      UserError: another dtype or D, or non-finite values; the row is named.
    """
    block = self._checked(block)
    if not len(block):
      return self
    mean = np.mean(block, axis=0, dtype=np.float64)
    # The term for the shift of the mean is one more row of the same product.
    rows = np.empty((len(block) + 1, len(mean)))
    np.subtract(block, mean, out=rows[:-1])
    rows[-1] = _shift(self.count, self.mean, len(block), mean)
    scatter = rows.T @ rows
    scatter += self.scatter
    mean = _mean(self.count, self.mean, len(block), mean)
    return Moments(self.count + len(block), mean, scatter)

  def gaussian(self) -> Gaussian:
    """Returns the mean and the unbiased covariance, scatter / (count - 1).

    Raises:
      UserError: fewer than two rows.
    """
    if self.count < 2:
      raise UserError(
        f"features: got {self.count} images, expected 2 or more for a "
        "covariance; use more images"
      )
    return Gaussian(self.mean, self.scatter / (self.count - 1))

  def _checked(self, block: np.ndarray) -> np.ndarray:
    block = np.asarray(block)
    dimension = len(self.mean)
    good = block.ndim == 2 and block.shape[1] == dimension
    if not good or block.dtype not in (np.float32, np.float64):
      raise UserError(
        f"features: got {block.dtype} of shape {block.shape}, expected float32 "
        f"or float64 [n, {dimension}]; pass one row per image, of the same "
        "features in every block"
      )
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
      row = int(np.argmin(finite))
      raise UserError(
        f"features: row {self.count + row} has NaN or infinity "
        f"({np.sum(~finite)} such rows of {len(block)} in this block), "
        "expected finite numbers; check that image and the network"
      )
    return block


def empty(dimension: int) -> Moments:
  """Returns moments of no rows, for `dimension` features."""
  return Moments(0, np.zeros(dimension), np.zeros((dimension, dimension)))


def from_features(
  features: np.ndarray, block_size: int = BLOCK_SIZE
) -> Moments:
  """Computes the moments of features [n, D].

  Args:
    features: float32 or float64 [n, D].
    block_size: rows converted to float64 at a time.

  Raises:
    UserError: wrong dtype or rank, or non-finite values; the row is named.
  """
  features = np.asarray(features)
  if features.ndim != 2:
    raise UserError(
      f"features: got shape {features.shape}, expected [n, D]; pass one row "
      "per image"
    )
  starts = range(0, len(features), block_size)
  blocks = (features[start : start + block_size] for start in starts)
  return functools.reduce(Moments.update, blocks, empty(features.shape[1]))


def merge(a: Moments, b: Moments) -> Moments:
  """Merges two moments; the result is bitwise symmetric in a and b.

  Raises:
    UserError: different numbers of features.
  """
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f"moments: got {len(a.mean)} and {len(b.mean)} features, expected the "
      "same number; merge only moments of the same features"
    )
  if not (a.count and b.count):
    return a if a.count else b
  shift = _shift(a.count, a.mean, b.count, b.mean)
  scatter = np.outer(shift, shift)
  scatter += a.scatter + b.scatter
  mean = _mean(a.count, a.mean, b.count, b.mean)
  return Moments(a.count + b.count, mean, scatter)


def _mean(n: int, a: np.ndarray, m: int, b: np.ndarray) -> np.ndarray:
  """Mean of n rows of mean a and m rows of mean b."""
  return (n / (n + m)) * a + (m / (n + m)) * b


def _shift(n: int, a: np.ndarray, m: int, b: np.ndarray) -> np.ndarray:
  """Returns the vector v with v v^T the between-group term of the scatter."""
  return np.sqrt(n / (n + m) * m) * (b - a)


def gather(moments: Moments) -> Moments:
  """Merges the moments of all hosts; every host gets bitwise the same result.

  A collective: every host must call it, also one without rows. Returns its
  argument on a single host.

  Args:
    moments: moments of this host's rows, with the same D on every host.
  """
  if jax.process_count() == 1:
    return moments
  packed = multihost_utils.process_allgather(_pack(moments))
  dimension = len(moments.mean)
  hosts = [_unpack(np.asarray(words), dimension) for words in packed]
  return functools.reduce(merge, hosts)


def _pack(moments: Moments) -> np.ndarray:
  """Packs into uint32 [2 (1 + D + D^2)]: JAX would round float64 to float32."""
  parts = [[float(moments.count)], moments.mean, moments.scatter.ravel()]
  return np.concatenate(parts).view(np.uint32)


def _unpack(words: np.ndarray, dimension: int) -> Moments:
  """Inverts `_pack` exactly."""
  count, mean, scatter = np.split(words.view(np.float64), [1, 1 + dimension])
  return Moments(int(count[0]), mean, scatter.reshape(dimension, dimension))
