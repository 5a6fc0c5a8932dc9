"""Kernel distance: brute force, another implementation, properties."""

import numpy as np
import pytest
import sklearn.metrics.pairwise

from bcm_jax.errors import UserError
from bcm_jax.metrics import kid


def clouds(seed, real=90, fake=70, dimension=10, shift=0.0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(real, dimension)),
          shift + rng.normal(size=(fake, dimension)))


def brute_force(real, fake):
  """The unbiased estimate, pair by pair."""

  def kernel(a, b):
    return (sum(x * y for x, y in zip(a, b, strict=True)) / len(a) + 1) ** 3

  def within(points):
    pairs = [(i, j) for i in range(len(points)) for j in range(len(points))]
    return np.mean([kernel(points[i], points[j]) for i, j in pairs if i != j])

  between = np.mean([kernel(a, b) for a in real for b in fake])
  return within(real) + within(fake) - 2 * between


def with_sklearn(x, y):
  kernel = sklearn.metrics.pairwise.polynomial_kernel
  m = len(x)
  own = sum((kernel(z).sum() - np.trace(kernel(z))) / (m * (m - 1))
            for z in (x, y))
  return own - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("block_size", [1, 4, 7, 100])
def test_is_the_definition_for_any_block(block_size):
  real, fake = clouds(0, 15, 11, 3)
  expected = brute_force(real, fake)
  found = kid.mmd_squared(real, fake, block_size)
  assert found == pytest.approx(expected, rel=1e-12)


def test_three_points_by_hand():
  # Kernels (xy + 1)^3 of 0 and 1: 1 within; of 2 with them: 1 and 27.
  real, fake = np.array([[0.0], [1.0]]), np.array([[2.0], [2.0]])
  assert kid.mmd_squared(real, fake) == pytest.approx(1 + 125 - 2 * 14)


def test_subsets_are_those_of_the_seed():
  real, fake = clouds(1, shift=0.3)
  real = real.astype(np.float32)
  rng = np.random.default_rng(5)
  expected = [
    with_sklearn(
      real[rng.choice(90, 40, replace=False)].astype(np.float64),
      fake[rng.choice(70, 40, replace=False)],
    )
    for _ in range(6)
  ]
  found = kid.kernel_distance(real, fake, subsets=6, subset_size=40, seed=5)
  assert found == pytest.approx((np.mean(expected), np.std(expected)))
  other = kid.kernel_distance(real, fake, subsets=6, subset_size=40, seed=6)
  assert other != found


def test_whole_sets_as_subsets_are_the_whole_estimate():
  real, fake = clouds(2, 50, 50)
  mean, deviation = kid.kernel_distance(real, fake, 3, 50)
  assert mean == pytest.approx(kid.mmd_squared(real, fake), rel=1e-9)
  assert deviation < 1e-12


def test_one_distribution_is_at_zero_without_bias():
  # The mean of many independent estimates, in units of its own error.
  estimates = [kid.mmd_squared(*clouds(seed, 30, 20)) for seed in range(200)]
  error = np.std(estimates) / np.sqrt(len(estimates))
  assert abs(np.mean(estimates)) < 3 * error
  assert min(estimates) < 0 < max(estimates)


def test_grows_with_the_shift():
  found = [kid.mmd_squared(*clouds(3, shift=s)) for s in (0.3, 1.0, 2.0)]
  assert 0 < found[0] < found[1] < found[2]


def test_bad_input_is_a_user_error():
  real, fake = clouds(4)
  with pytest.raises(UserError, match="of 2 to 70 rows"):
    kid.kernel_distance(real, fake)
  with pytest.raises(UserError, match="0 subsets"):
    kid.kernel_distance(real, fake, 0, 10)
  with pytest.raises(UserError, match="real and fake: got .* values per row"):
    kid.mmd_squared(real, fake[:, :4])
  with pytest.raises(UserError, match="1 real and 70 fake"):
    kid.mmd_squared(real[:1], fake)
  with pytest.raises(UserError, match="fake: got NaN"):
    kid.mmd_squared(real, fake * np.nan)
