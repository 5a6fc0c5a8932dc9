"""Frechet distances: reference numbers, closed forms, properties."""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import fid
from bcm_jax.metrics import moments
from tests import golden

FILE = golden.load("fid_frechet")
CASES = [
  key.removeprefix("out/").removesuffix("_exact")
  for key in FILE.arrays
  if key.endswith("_exact")
]
# The same with 40 digits (mpmath), where eigenvalues of 1e-15 are set to 0.
FORTY_DIGITS = {
  "singular": 174.178607528772304,
  "one_singular": 183.129751981083846,
}


def recorded(case):
  return (
    moments.Gaussian(FILE[f"in/{case}_mu{i}"], FILE[f"in/{case}_sigma{i}"])
    for i in (1, 2)
  )


def random_gaussian(seed, dimension=20, samples=400):
  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(dimension, dimension))
  rows = rng.normal(size=(samples, dimension)) @ mix
  rows += rng.normal(size=dimension)
  return moments.from_features(rows).gaussian()


@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_references(case):
  found = fid.frechet_distance(*recorded(case))
  # Roots of eigenvalues that should be 0 are 1e-8 there.
  rel = 3e-8 if "singular" in case else 1e-9
  for tool in ("exact", "pytorch_fid", "edm", "adm"):
    theirs = float(FILE[f"out/{case}_{tool}"])
    assert found == pytest.approx(theirs, rel=rel, abs=1e-12)


@pytest.mark.parametrize("case", FORTY_DIGITS)
def test_of_singular_covariances_keeps_its_digits(case):
  assert case in CASES
  found = fid.frechet_distance(*recorded(case))
  assert found == pytest.approx(FORTY_DIGITS[case], rel=1e-14)


def test_of_diagonal_gaussians_is_the_closed_form():
  rng = np.random.default_rng(0)
  means, variances = rng.normal(size=(2, 30)), rng.random((2, 30))
  variances[0, :5] = 0.0
  variances[1, 3:9] = 0.0
  expected = np.sum((means[0] - means[1]) ** 2)
  expected += np.sum((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
  a, b = (
    moments.Gaussian(m, np.diag(v))
    for m, v in zip(means, variances, strict=True)
  )
  assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-14)


def test_of_commuting_gaussians_in_any_basis():
  rng = np.random.default_rng(1)
  basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
  # Over twelve orders of magnitude: roots of eigenvalues lose the small ones.
  roots = 10.0 ** rng.uniform(-6, 0, (2, 40))
  a, b = (moments.Gaussian(np.zeros(40), (basis * r**2) @ basis.T)
          for r in roots)
  expected = np.sum((roots[0] - roots[1]) ** 2)
  assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [400, 20, 8])
def test_a_set_is_at_zero_from_itself(samples):
  a = random_gaussian(2, samples=samples)
  found = fid.frechet_distance(a, a)
  assert 0.0 <= found < 1e-13 * np.trace(a.covariance)


def test_order_and_blocks_of_the_features_change_nothing():
  rng = np.random.default_rng(3)
  rows = rng.normal(size=(300, 15)).astype(np.float32)
  other = random_gaussian(4, 15)
  expected = fid.frechet_distance(
    moments.from_features(rows).gaussian(), other
  )
  for block_size in (1, 7, 299):
    again = moments.from_features(rng.permutation(rows), block_size).gaussian()
    assert fid.frechet_distance(again, other) == pytest.approx(
      expected, rel=1e-12
    )
    assert 0.0 <= fid.frechet_distance(
      again, moments.from_features(rows).gaussian()
    ) < 1e-12


@pytest.mark.parametrize("samples", [400, 8])
def test_is_symmetric(samples):
  a, b = random_gaussian(5, samples=samples), random_gaussian(6)
  ab, ba = fid.frechet_distance(a, b), fid.frechet_distance(b, a)
  assert ab == pytest.approx(ba, rel=1e-14)
  assert ab > 1.0


def test_a_shift_adds_its_square():
  a, b = random_gaussian(7), random_gaussian(8)
  shift = np.arange(20) / 8.0
  moved = moments.Gaussian(a.mean + shift, a.covariance)
  assert fid.frechet_distance(moved, a) == pytest.approx(
    shift @ shift, rel=1e-14
  )
  centred = [moments.Gaussian(np.zeros(20), g.covariance) for g in (a, b)]
  moved = moments.Gaussian(shift, a.covariance)
  assert fid.frechet_distance(moved, centred[1]) == pytest.approx(
    shift @ shift + fid.frechet_distance(*centred), rel=1e-14
  )


def test_fewer_samples_than_dimensions_by_their_own_factors():
  rng = np.random.default_rng(9)
  rows = [rng.normal(size=(n, 200)) for n in (30, 50)]
  roots = [(r - r.mean(axis=0)) / np.sqrt(len(r) - 1) for r in rows]
  expected = (
    np.sum((rows[0].mean(axis=0) - rows[1].mean(axis=0)) ** 2)
    + sum(np.sum(r**2) for r in roots)
    - 2.0 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
  )
  a, b = (moments.from_features(r).gaussian() for r in rows)
  assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_bad_gaussians_are_user_errors():
  good = random_gaussian(10, 3)
  mean, covariance = good
  skew = covariance + np.triu(np.ones((3, 3)), 1)
  for bad, words in (
    ((mean, covariance[:2]), r"expected \[D\] and \[D, D\]"),
    ((mean[:0], covariance[:0, :0]), r"expected \[D\] and \[D, D\]"),
    ((mean * np.nan, covariance), "a: got NaN"),
    ((mean, skew), "differs from its transpose"),
    ((mean, -covariance), "expected >= 0"),
    (random_gaussian(11, 4), "4 and 3 dimensions"),
  ):
    with pytest.raises(UserError, match=words):
      fid.frechet_distance(bad, good)
