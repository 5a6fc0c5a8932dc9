"""Nearest neighbors in feature or pixel space, and the memorization check.

Distances are Euclidean, in the units of the arrays (both arrays must be on the
same scale), and computed in float64 by blocks, so memory depends on the block
size and not on the number of pairs.
"""

from collections.abc import Iterator

import numpy as np

from bcm_jax.errors import UserError

# 2048 x 2048 float64 distances are 32 MiB; larger blocks are not faster.
BLOCK_SIZE = 2048


def as_features(name: str, points: np.ndarray) -> np.ndarray:
  """Flattens [N, ...] to [N, D] and checks that all values are finite.

  Args:
    name: name of the array in error messages.
    points: [N, ...], any real dtype.

  Returns:
    [N, D] of the same dtype; blocks are converted to float64 later.

  Raises:
    UserError: no points, no feature axis, or values that are not finite.
  """
  points = np.asarray(points)
  if points.ndim < 2 or points.size == 0:
    raise UserError(
      f"{name}: got shape {points.shape}, expected [N, D] or [N, H, W, C] "
      "with N >= 1; pass one row per point"
    )
  points = points.reshape(len(points), -1)
  # By blocks, because np.isfinite allocates a mask of the whole array.
  if not all(np.isfinite(block).all() for _, block in blocks(points)):
    raise UserError(
      f"{name}: got NaN or infinity, expected finite numbers; remove or "
      "repair those rows first"
    )
  return points


def comparable(
  name_a: str, a: np.ndarray, name_b: str, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Applies `as_features` to both arrays and checks that they are comparable.

  Raises:
    UserError: different numbers of features, or one integer array (0..255) and
      one float array (a range of 1 or 2), which are on different scales.
  """
  a, b = as_features(name_a, a), as_features(name_b, b)
  if a.shape[1] != b.shape[1]:
    raise UserError(
      f"{name_a} and {name_b}: got {a.shape[1]} and {b.shape[1]} values per "
      "row, expected the same number; use the same image size and features "
      "for both"
    )
  if (a.dtype.kind in "iub") != (b.dtype.kind in "iub"):
    raise UserError(
      f"{name_a} and {name_b}: got {a.dtype} and {b.dtype}, expected both "
      "integer or both floating; convert them to the same scale"
    )
  return a, b


def blocks(
  points: np.ndarray, block_size: int = BLOCK_SIZE
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields (rows, float64 [<=block_size, D]) over points [N, D]."""
  for start in range(0, len(points), block_size):
    rows = slice(start, min(start + block_size, len(points)))
    yield rows, points[rows].astype(np.float64)


def squared_distances(
  a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Computes all squared distances as one matrix product, and their tolerance.

  The form |a|^2 + |b|^2 - 2 ab is the only affordable one at 50,000 x 50,000 x
  2,048, but it cancels for near points: equal distances differ in the last
  bits. The tolerance bounds the difference between two computed values of equal
  distances. The dot product of D terms has an error of at most D eps/2 |a||b|
  (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and so
  has the distance from a to the other point, whose norm is at most 2|a| + |b|
  when the two distances are equal.

  Args:
    a: float64 [n, D].
    b: float64 [m, D].

  Returns:
    (squared distances >= 0, tolerance), float64 [n, m] each.
  """
  norms = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None, :]
  # In place, because allocating n x m arrays takes as long as the product.
  squared = a @ b.T
  squared *= -2.0
  squared += norms
  np.maximum(squared, 0.0, out=squared)
  norms *= 10.0 * (a.shape[1] + 3) * np.finfo(np.float64).eps
  return squared, norms


def nearest_distance(
  queries: np.ndarray,
  references: np.ndarray,
  block_size: int = BLOCK_SIZE,
) -> np.ndarray:
  """Computes the distance from each query to its nearest reference.

  Args:
    queries: [Q, ...], flattened to rows.
    references: [R, ...] on the same scale.
    block_size: rows of each array converted to float64 at a time.

  Returns:
    float64 [Q], in the units of the input; exactly 0 for exact copies.

  Raises:
    UserError: shapes or scales differ, or values that are not finite.
  """
  queries, references = comparable("queries", queries, "references", references)
  distances = np.empty(len(queries))
  for rows, query in blocks(queries, block_size):
    best = np.full(len(query), np.inf)
    nearest = np.zeros(len(query), np.int64)
    for columns, reference in blocks(references, block_size):
      squared, _ = squared_distances(query, reference)
      column = np.argmin(squared, axis=1)
      value = squared[np.arange(len(query)), column]
      nearest = np.where(value < best, columns.start + column, nearest)
      best = np.minimum(value, best)
    # The product form is exact enough for ranking only (a copy would be at
    # 1e-7, not 0), so the distance itself is computed from the difference.
    gap = query - references[nearest].astype(np.float64)
    distances[rows] = np.sqrt(np.sum(gap * gap, axis=1))
  return distances


def memorization(
  samples: np.ndarray, train: np.ndarray, test: np.ndarray
) -> dict[str, float]:
  """Compares the distances of samples and of test images to the training
  images.

  Args:
    samples: [S, ...] generated images or features.
    train: [N, ...] training images on the same scale.
    test: [T, ...] held-out real images on the same scale.

  Returns:
    median_sample_to_train, median_test_to_train: median distances to the
    nearest training image, in the units of the input. memorization_ratio: the
    first divided by the second; about 1 if samples are as far from the training
    images as held-out images are, about 0 if they are copies. NaN if the test
    images are copies themselves (median 0).

  Raises:
    UserError: as `nearest_distance`.
  """
  from_samples = float(np.median(nearest_distance(samples, train)))
  from_test = float(np.median(nearest_distance(test, train)))
  ratio = from_samples / from_test if from_test > 0 else float("nan")
  return {
    "median_sample_to_train": from_samples,
    "median_test_to_train": from_test,
    "memorization_ratio": ratio,
  }
