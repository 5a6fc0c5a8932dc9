"""Mean and covariance of features that come in blocks, in float64.

Kept as the mean and the scatter around it, and merged by the formula of Chan,
Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances". Raw sums of squares, which most evaluators add up,
lose the digits that the mean and the covariance share.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax.errors import UserError

# Rows as float64 at a time: 64 MiB at 2048 features. Adding two D x D matrices
# is what a block costs besides its product, so small blocks are slow.
BLOCK_SIZE = 4096


class Gaussian(NamedTuple):
  """What a Frechet distance is taken between.

  Attributes:
    mean: float64 [D].
    covariance: float64 [D, D].
  """

  mean: np.ndarray
  covariance: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Of the rows seen so far; updates return new ones.

  Attributes:
    count: rows seen.
    mean: float64 [D].
    scatter: float64 [D, D], the sum of (x - mean) (x - mean)^T.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  def update(self, block: np.ndarray) -> "Moments":
    """Adds rows.

    Args:
      block: float32 or float64 [n, D], n >= 0.

    Returns:
      The moments of all rows, the same in any order and any cut into blocks,
      to rounding.

    Raises:
      UserError: another dtype or D, or NaN or infinity: the row is named.
    """
    block = self._checked(block)
    if not len(block):
      return self
    mean = np.mean(block, axis=0, dtype=np.float64)
    # The shift of the mean rides along as one more row: one product for all.
    rows = np.empty((len(block) + 1, len(mean)))
    np.subtract(block, mean, out=rows[:-1])
    rows[-1] = _shift(self.count, self.mean, len(block), mean)
    scatter = rows.T @ rows
    scatter += self.scatter
    mean = _mean(self.count, self.mean, len(block), mean)
    return Moments(self.count + len(block), mean, scatter)

  def gaussian(self) -> Gaussian:
    """The mean and the unbiased covariance, scatter / (count - 1).

    Raises:
      UserError: fewer than two rows.
    """
    if self.count < 2:
      raise UserError(
        f"there are features of {self.count} images, expected 2 or more for "
        "a covariance: use more images"
      )
    return Gaussian(self.mean, self.scatter / (self.count - 1))

  def _checked(self, block: np.ndarray) -> np.ndarray:
    block = np.asarray(block)
    dimension = len(self.mean)
    good = block.ndim == 2 and block.shape[1] == dimension
    if not good or block.dtype not in (np.float32, np.float64):
      raise UserError(
        f"features are {block.dtype} of shape {block.shape}, expected float32 "
        f"or float64 [n, {dimension}]: pass one row an image, of the features "
        "that these moments began with"
      )
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
      row = int(np.argmin(finite))
      raise UserError(
        f"row {self.count + row} of the features holds NaN or infinity "
        f"({np.sum(~finite)} such rows of {len(block)} in this block), "
        "expected finite numbers: look at that image and at the network"
      )
    return block


def empty(dimension: int) -> Moments:
  """Moments of no rows yet, of `dimension` features."""
  return Moments(0, np.zeros(dimension), np.zeros((dimension, dimension)))


def from_features(
  features: np.ndarray, block_size: int = BLOCK_SIZE
) -> Moments:
  """Moments of features [n, D] that are all there.

  Args:
    features: float32 or float64 [n, D].
    block_size: rows held as float64 at a time.

  Raises:
    UserError: no such array, or NaN or infinity: the row is named.
  """
  features = np.asarray(features)
  if features.ndim != 2:
    raise UserError(
      f"features have shape {features.shape}, expected [n, D]: pass one row "
      "an image"
    )
  starts = range(0, len(features), block_size)
  blocks = (features[start : start + block_size] for start in starts)
  return functools.reduce(Moments.update, blocks, empty(features.shape[1]))


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of the rows of both; the same bits with a and b swapped.

  Raises:
    UserError: they have different numbers of features.
  """
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f"moments of {len(a.mean)} and of {len(b.mean)} features, expected the "
      "same: merge only what one network made"
    )
  if not (a.count and b.count):
    return a if a.count else b
  shift = _shift(a.count, a.mean, b.count, b.mean)
  scatter = np.outer(shift, shift)
  scatter += a.scatter + b.scatter
  mean = _mean(a.count, a.mean, b.count, b.mean)
  return Moments(a.count + b.count, mean, scatter)


def _mean(n: int, a: np.ndarray, m: int, b: np.ndarray) -> np.ndarray:
  """The mean of n rows of mean a and m rows of mean b."""
  return (n / (n + m)) * a + (m / (n + m)) * b


def _shift(n: int, a: np.ndarray, m: int, b: np.ndarray) -> np.ndarray:
  """Its outer square is what the two means being apart adds to the scatter."""
  return np.sqrt(n / (n + m) * m) * (b - a)


def gather(moments: Moments) -> Moments:
  """Merges the moments of all hosts; every host gets the same bits.

  Every host has to call it, also one that has seen no rows. On one host it
  returns what it was given.

  Args:
    moments: of this host's rows, of as many features on every host.
  """
  if jax.process_count() == 1:
    return moments
  words = multihost_utils.process_allgather(_pack(moments))
  dimension = len(moments.mean)
  every = [_unpack(np.asarray(each), dimension) for each in words]
  return functools.reduce(merge, every)


def _pack(moments: Moments) -> np.ndarray:
  """As uint32 [2 (1 + D + D D)]: JAX would round float64 to float32."""
  parts = [[float(moments.count)], moments.mean, moments.scatter.ravel()]
  return np.concatenate(parts).view(np.uint32)


def _unpack(words: np.ndarray, dimension: int) -> Moments:
  """Undoes `_pack`, bit by bit."""
  count, mean, scatter = np.split(words.view(np.float64), [1, 1 + dimension])
  return Moments(int(count[0]), mean, scatter.reshape(dimension, dimension))
