"""Nearest neighbours in feature or pixel space, and the memorisation check.

Distances are Euclidean, in the units of the arrays given (pass both sides on
one scale), computed in float64 block by block: memory grows with the block
size, never with the number of pairs.
"""

from collections.abc import Iterator

import numpy as np

from bcm_jax.errors import UserError

# 2048 x 2048 float64 distances are 32 MiB; larger blocks gain no speed.
BLOCK_SIZE = 2048


def as_features(name: str, points: np.ndarray) -> np.ndarray:
  """Flattens [N, ...] to [N, D] and checks it.

  Args:
    name: what to call the array in an error.
    points: [N, ...], any real dtype; kept as it is, blocks are cast later.

  Returns:
    [N, D], same dtype.

  Raises:
    UserError: no points, no axis of features, or values that are not finite.
  """
  points = np.asarray(points)
  if points.ndim < 2 or points.size == 0:
    raise UserError(
      f"{name} has shape {points.shape}, expected [N, D] or [N, H, W, C] "
      "with N >= 1: pass at least one point, one row each"
    )
  points = points.reshape(len(points), -1)
  # By blocks: np.isfinite of a whole array would be a copy of its size / 4.
  if not all(np.isfinite(block).all() for _, block in blocks(points)):
    raise UserError(
      f"{name} holds NaN or infinity, expected finite numbers: leave out "
      "or repair those rows first"
    )
  return points


def comparable(
  name_a: str, a: np.ndarray, name_b: str, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """`as_features` of both, after checking that they can share one space.

  Raises:
    UserError: other numbers of features, or integers (0..255) against floats
      (a scale of 1 or 2), between which a distance means nothing.
  """
  a, b = as_features(name_a, a), as_features(name_b, b)
  if a.shape[1] != b.shape[1]:
    raise UserError(
      f"{name_a} has {a.shape[1]} numbers a row and {name_b} has "
      f"{b.shape[1]}, expected the same: use the same image size and "
      "features for both"
    )
  if (a.dtype.kind in "iub") != (b.dtype.kind in "iub"):
    raise UserError(
      f"{name_a} is {a.dtype} and {name_b} is {b.dtype}, expected both "
      "integer or both floating: bring them to one scale"
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
  """Squared distances of every pair as one matrix product, and their error.

  |a|^2 + |b|^2 - 2 ab is the only affordable form at 50,000 x 50,000 x 2,048,
  but it cancels for near points: ties and copies come out unequal in the last
  bits. The second result bounds how far apart two equal distances can come
  out: the dot product of D terms is off by at most D eps/2 |a||b| (Higham,
  Accuracy and Stability of Numerical Algorithms, section 3.1), the same again
  for the distance from a that is compared with this one, whose other end is
  no longer than 2|a| + |b| when the two are equal.

  Args:
    a: float64 [n, D].
    b: float64 [m, D].

  Returns:
    (squared distances >= 0, tolerance), float64 [n, m] each.
  """
  norms = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None, :]
  # In place: new n x m arrays would cost as much as the product.
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
  """Distance from each query to its nearest reference.

  Args:
    queries: [Q, ...], flattened to rows.
    references: [R, ...], on the same scale.
    block_size: rows of each side held as float64 at a time.

  Returns:
    float64 [Q], in the units of the input; exactly 0 for exact copies.

  Raises:
    UserError: shapes or scales that do not fit, or values not finite.
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
    # The product form is only good for ranking: a copy would be at 1e-7, not
    # at 0, so the distance of the winner is taken from the difference.
    gap = query - references[nearest].astype(np.float64)
    distances[rows] = np.sqrt(np.sum(gap * gap, axis=1))
  return distances


def memorisation(
  samples: np.ndarray, train: np.ndarray, test: np.ndarray
) -> dict[str, float]:
  """Are samples nearer to the training images than fresh real images are?

  Args:
    samples: [S, ...] generated images or features.
    train: [N, ...] what the model was trained on, same scale.
    test: [T, ...] real ones it has not seen, same scale.

  Returns:
    median_sample_to_train and median_test_to_train: medians of the distance
    to the nearest training row, in the units of the input. ratio: the first
    over the second; near 1 is as new as real data, near 0 is copying. It is
    NaN where the test images are themselves copies (median 0).

  Raises:
    UserError: as `nearest_distance`.
  """
  sample = float(np.median(nearest_distance(samples, train)))
  fresh = float(np.median(nearest_distance(test, train)))
  return {
    "median_sample_to_train": sample,
    "median_test_to_train": fresh,
    "ratio": sample / fresh if fresh > 0 else float("nan"),
  }
