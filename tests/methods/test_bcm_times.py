"""The joint law of start t, target r and end u of a jump."""

import functools

import numpy as np
import pytest
from scipy import stats

from tests import toys

DRAWS = 20_000


@functools.cache
def draws(include_T):  # noqa: N803 (the literature's T)
  images = np.zeros((DRAWS, 1, 1, 1), np.float32)
  method = toys.bidirectional_toy(include_T=include_T)
  ctx = toys.context(images, method.curriculum(0))
  times = method.sample_times(ctx)
  return times, method.sample_end(ctx, times.index)


@functools.cache
def law(include_T):  # noqa: N803 (the literature's T)
  """Grid of N = 11, laws of t's index and of u's, from their definitions."""
  grid = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 11) ** 7
  mass = np.diff(stats.norm(-1.1, 2).cdf(np.log(grid)))
  if include_T:
    start, end = np.append(0, mass), np.append(mass, mass[-1])
  else:
    start = np.concatenate([[0], mass[:-1], [0]])
    end = np.append(mass, 0)
  return grid, start / start.sum(), end / end.sum()


@pytest.mark.parametrize("include_T", [True, False])
def test_the_joint_law_of_start_and_end(include_T):  # noqa: N803
  times, u = draws(include_T)
  grid, start, end = law(include_T)
  i = np.asarray(times.index)
  j = np.argmin(np.abs(np.log(u)[:, None] - np.log(grid)), axis=1)
  np.testing.assert_allclose(times.t, grid[i], rtol=1e-5)
  np.testing.assert_allclose(times.r, grid[i - 1], rtol=1e-5)
  np.testing.assert_allclose(u, grid[j], rtol=1e-5)
  # P(i, j) = start(i) end(j) / (1 - end(i)), j other than i.
  joint = start[:, None] * end / (1 - end[:, None])
  np.fill_diagonal(joint, 0)
  np.testing.assert_allclose(joint.sum(), 1)
  counts = np.zeros_like(joint)
  np.add.at(counts, (i, j), 1)
  assert counts[joint == 0].sum() == 0
  often = DRAWS * joint >= 5
  observed = np.append(counts[often], counts[~often].sum())
  expected = DRAWS * np.append(joint[often], joint[~often].sum())
  assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("include_T,largest", [(True, 10), (False, 9)])
def test_which_levels_are_reached(include_T, largest):  # noqa: N803
  times, u = draws(include_T)
  top = law(include_T)[0][largest]
  np.testing.assert_allclose(times.t.max(), top, rtol=1e-5)
  np.testing.assert_allclose(u.max(), top, rtol=1e-5)
  np.testing.assert_allclose(u.min(), 0.002, rtol=1e-5)
  assert np.all(times.r < times.t) and np.all(u != times.t)
  above = np.mean(u > times.t)
  assert 0.2 < above < 0.8
