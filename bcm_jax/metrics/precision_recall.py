"""Improved precision and recall.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing
Generative Models" (arXiv:1904.06991), equations 1-2, with the conventions of
the ADM evaluator: a ball around each point out to its k-th nearest other point
of its own set (k = 3); a point on the boundary is inside. The ADM evaluator
rounds distances to half precision, here they are float64.
"""

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.metrics import neighbours


def manifold_radii(
  points: np.ndarray, k: int = 3, block_size: int = neighbours.BLOCK_SIZE
) -> np.ndarray:
  """Distance from each point to its k-th nearest other point of the set.

  Args:
    points: [N, ...], flattened to rows. Copies of a point count as others.
    k: which neighbour, 1 <= k < N.
    block_size: rows of each side held as float64 at a time.

  Returns:
    float64 [N], in the units of the input.

  Raises:
    UserError: fewer than k + 1 points, k below 1, or values not finite.
  """
  points = neighbours.as_features("points", points)
  if not 1 <= k < len(points):
    raise UserError(
      f"k is {k} for a set of {len(points)} points, expected "
      f"1 <= k < {len(points)}: use more points or another k"
    )
  squared_radii = np.empty(len(points))
  for rows, block in neighbours.blocks(points, block_size):
    smallest = np.empty((len(block), 0))
    for columns, other in neighbours.blocks(points, block_size):
      squared, _ = neighbours.squared_distances(block, other)
      if rows == columns:
        np.fill_diagonal(squared, np.inf)
      smallest = np.concatenate([smallest, squared], axis=1)
      if smallest.shape[1] > k:
        smallest = np.partition(smallest, k - 1, axis=1)[:, :k]
    squared_radii[rows] = np.max(smallest, axis=1)
  return np.sqrt(squared_radii)


def precision_recall(
  real: np.ndarray,
  fake: np.ndarray,
  k: int = 3,
  block_size: int = neighbours.BLOCK_SIZE,
) -> tuple[float, float]:
  """Share of each set that lies in the manifold of the other.

  Both depend on the sizes of the sets: compare only numbers that were taken
  with the same N, M and k. Equal distances count as equal: what rounding
  could have made of a tie counts as inside.

  Args:
    real: [N, ...] features or pixels, flattened to rows.
    fake: [M, ...], on the same scale.
    k: the neighbour that sets the radius, 1 <= k < min(N, M).
    block_size: rows of each side held as float64 at a time.

  Returns:
    (precision, recall) in [0, 1]: the share of fake points inside at least
    one ball of the real set (quality), and the share of real points inside at
    least one ball of the fake set (coverage).

  Raises:
    UserError: shapes or scales that do not fit, too few points for k, or
      values not finite.
  """
  real, fake = neighbours.comparable("real", real, "fake", fake)
  real_squared = manifold_radii(real, k, block_size) ** 2
  fake_squared = manifold_radii(fake, k, block_size) ** 2
  real_inside = np.zeros(len(real), bool)
  fake_inside = np.zeros(len(fake), bool)
  for rows, real_block in neighbours.blocks(real, block_size):
    for columns, fake_block in neighbours.blocks(fake, block_size):
      squared, tolerance = neighbours.squared_distances(real_block, fake_block)
      lowest = squared - tolerance
      in_real_ball = lowest <= real_squared[rows, None]
      in_fake_ball = lowest <= fake_squared[None, columns]
      fake_inside[columns] |= in_real_ball.any(axis=0)
      real_inside[rows] |= in_fake_ball.any(axis=1)
  return float(fake_inside.mean()), float(real_inside.mean())
