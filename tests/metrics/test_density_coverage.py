"""Density and coverage: the definition, closed cases, one pass for all."""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import precision_recall as pr


def brute_force(real, fake, k):
  """Equations 4-5 of Naeem et al. 2020, point by point."""
  balls = []
  for i, x in enumerate(real):
    others = np.delete(real, i, axis=0)
    radius = np.sort(np.linalg.norm(others - x, axis=1))[k - 1]
    balls.append([np.linalg.norm(y - x) <= radius for y in fake])
  balls = np.array(balls)
  return balls.sum() / (k * len(fake)), balls.any(axis=1).mean()


def clouds(seed, real_count=130, fake_count=90, dim=6, shift=0.4, scale=0.9):
  rng = np.random.default_rng(seed)
  real = rng.normal(size=(real_count, dim))
  return real, shift + scale * rng.normal(size=(fake_count, dim))


@pytest.mark.parametrize("k", [1, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_definition(seed, k):
  real, fake = clouds(seed)
  found = pr.prdc(real, fake, 3, k)
  density, coverage = brute_force(real, fake, k)
  assert found.density == pytest.approx(density, rel=1e-14)
  assert found.coverage == coverage
  assert 0.1 < coverage < 1.0


@pytest.mark.parametrize("block_size", [2, 33, 90, 130])
@pytest.mark.parametrize("k, density_k", [(3, 5), (5, 2)])
def test_blocks_change_nothing(block_size, k, density_k):
  real, fake = clouds(4)
  whole = pr.prdc(real, fake, k, density_k)
  assert pr.prdc(real, fake, k, density_k, block_size) == whole


@pytest.mark.parametrize("k", [1, 3, 6])
def test_precision_and_recall_are_those_of_a_pass_of_their_own(k):
  real, fake = clouds(5)
  found = pr.prdc(real, fake, k, 5)
  assert found[:2] == pr.prdc(real, fake, k, k)[:2]


def test_defaults_are_three_and_five():
  real, fake = clouds(6)
  assert pr.prdc(real, fake) == pr.prdc(real, fake, 3, 5)
  assert pr.prdc(real, fake) != pr.prdc(real, fake, 5, 3)


def test_one_distribution_has_density_near_one_and_the_known_coverage():
  rng = np.random.default_rng(7)
  real, fake = rng.normal(size=(2, 2000, 8))
  found = pr.prdc(real, fake)
  assert found.density == pytest.approx(1.0, abs=0.1)
  # A ball is empty where the k nearest of the N - 1 + M others are all real.
  j = np.arange(5)
  expected = 1 - np.prod((2000 - 1 - j) / (4000 - 1 - j))
  assert found.coverage == pytest.approx(expected, abs=0.01)


def test_an_outlier_lifts_precision_and_not_density():
  # The paper's example: the ball of one real outlier takes in bad samples.
  rng = np.random.default_rng(8)
  real = np.concatenate([rng.normal(size=(300, 2)), [[40.0, 0.0]]])
  fake = rng.uniform(8.0, 30.0, (200, 2)) * [1.0, 0.5]
  found = pr.prdc(real, fake, 3, 3)
  assert found.precision > 0.9
  assert found.density < 0.4
  assert found.coverage < 0.02


def test_sets_far_apart_share_nothing():
  real, fake = clouds(9)
  assert pr.prdc(real, fake + 100.0) == (0.0, 0.0, 0.0, 0.0)


def test_ties_count_as_inside_in_many_dimensions():
  rng = np.random.default_rng(10)
  points = 20.0 * rng.random((30, 2048)).astype(np.float32)
  real = np.repeat(points, 6, axis=0)  # Every radius is 0.
  fake = np.concatenate([points, points + 0.01])
  fake = np.repeat(fake, 6, axis=0)[rng.permutation(360)]
  # Half of the fakes, each in its own six balls of k = 5.
  assert pr.prdc(real, fake, block_size=17) == (0.5, 1.0, 0.5 * 6 / 5, 1.0)


def test_too_few_points_are_a_user_error():
  real, fake = clouds(11, 10, 5)
  with pytest.raises(UserError, match="1 <= k < 5"):
    pr.prdc(real, fake)
  assert pr.prdc(real, fake, 3, 4)
