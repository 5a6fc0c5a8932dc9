"""Precision, recall, density and coverage of generated samples.

Kynkaanniemi et al. (2019), "Improved Precision and Recall Metric for Assessing
Generative Models" (arXiv:1904.06991), equations 1-2, with the conventions of
the ADM evaluator: the radius of each ball is the distance to the k-th nearest
other point of the same set (k = 3); a point on the boundary is inside. The ADM
evaluator rounds distances to half precision, here they are float64.

Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics for Generative
Models" (arXiv:2002.09797), equations 4-5: density and coverage use the balls
of the real set only, with k = 5. In the paper a point on the boundary is
outside, here it is inside for all four.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.metrics import nearest_neighbors

# Neighbors of density and coverage.
DENSITY_K = 5


class Prdc(NamedTuple):
  """Precision, recall, density and coverage.

  Attributes:
    precision: fraction of fake points inside at least one ball of the real set.
    recall: fraction of real points inside at least one ball of the fake set.
    density: mean number of real balls that contain a fake point, divided by k;
      about 1 for two samples of one distribution, and not bounded by 1.
    coverage: fraction of real points whose ball contains a fake point.
  """

  precision: float
  recall: float
  density: float
  coverage: float


def prdc(
  real: np.ndarray,
  fake: np.ndarray,
  k: int = 3,
  density_k: int = DENSITY_K,
  block_size: int = nearest_neighbors.BLOCK_SIZE,
) -> Prdc:
  """Computes all four metrics in one pass over the distances.

  All depend on the sizes of the sets: compare only numbers with equal N, M and
  k. A distance that could be a tie up to rounding counts as inside.

  Args:
    real: [N, ...] features or pixels, flattened to rows.
    fake: [M, ...] on the same scale.
    k: neighbor whose distance is the radius for precision and recall,
      1 <= k < min(N, M).
    density_k: the same for density and coverage.
    block_size: rows of each set converted to float64 at a time.

  Raises:
    UserError: incompatible shapes or scales, too few points for k, or
      non-finite values.
  """
  real, fake = nearest_neighbors.comparable("real", real, "fake", fake)
  for number in (k, density_k):
    _check_k(number, real)
    _check_k(number, fake)
  nearest = _squared_to_nearest(real, max(k, density_k), block_size)
  fake_radii = _squared_to_nearest(fake, k, block_size)[:, k - 1]
  precise = np.zeros(len(fake), bool)
  recalled, covered = np.zeros((2, len(real)), bool)
  balls = 0
  for rows, real_block in nearest_neighbors.blocks(real, block_size):
    radii, dense_radii = nearest[rows, k - 1], nearest[rows, density_k - 1]
    for columns, fake_block in nearest_neighbors.blocks(fake, block_size):
      lowest, tolerance = nearest_neighbors.squared_distances(
          real_block, fake_block
      )
      lowest -= tolerance
      precise[columns] |= (lowest <= radii[:, None]).any(axis=0)
      recalled[rows] |= (lowest <= fake_radii[columns]).any(axis=1)
      dense = lowest <= dense_radii[:, None]
      covered[rows] |= dense.any(axis=1)
      balls += np.count_nonzero(dense)
  return Prdc(
    precision=float(precise.mean()),
    recall=float(recalled.mean()),
    density=float(balls / (density_k * len(fake))),
    coverage=float(covered.mean()),
  )


def _check_k(k: int, points: np.ndarray) -> None:
  if not 1 <= k < len(points):
    raise UserError(
      f"k: got {k} for a set of {len(points)} points, expected "
      f"1 <= k < {len(points)}; use more points or another k"
    )


def _pairs(
  points: np.ndarray, block_size: int
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields (rows, squared distances to other points), each pair in both orders.

  Off-diagonal blocks are yielded twice, the second time transposed.
  """
  for rows, block in nearest_neighbors.blocks(points, block_size):
    for part, other in nearest_neighbors.blocks(
      points[rows.start :], block_size
    ):
      squared, _ = nearest_neighbors.squared_distances(block, other)
      if part.start == 0:
        np.fill_diagonal(squared, np.inf)
        yield rows, squared
      else:
        columns = slice(rows.start + part.start, rows.start + part.stop)
        yield rows, squared
        yield columns, squared.T


def _squared_to_nearest(
  points: np.ndarray, k: int, block_size: int
) -> np.ndarray:
  """Returns squared distances to the k nearest others, float64 [N, k]."""
  nearest = np.full((len(points), k), np.inf)
  for rows, squared in _pairs(points, block_size):
    count = min(k, squared.shape[1])
    candidates = np.partition(squared, count - 1, axis=1)[:, :count]
    candidates = np.concatenate([nearest[rows], candidates], axis=1)
    nearest[rows] = np.sort(candidates, axis=1)[:, :k]
  return nearest
