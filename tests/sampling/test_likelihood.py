"""Bits a dimension against the entropy of Gaussian images."""

import math

import jax
import numpy as np
import pytest

from bcm_jax.sampling import likelihood

SPREAD = 0.3


def denoise(params, x, sigma, labels):
  """The exact denoiser of N(0, SPREAD^2)."""
  del params, labels
  ratio = SPREAD**2 / (SPREAD**2 + sigma**2)
  return ratio[:, None, None, None] * x


@pytest.fixture(scope="module")
def images():
  x = SPREAD * np.random.default_rng(0).standard_normal((64, 8, 8, 1))
  return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def bits(images, **options):
  found, calls = likelihood.bits_per_dim(
      denoise, None, images, None, jax.random.key(1),
      likelihood.Likelihood(**options),
  )
  assert found.shape == (len(images),) and calls > 20
  return float(np.mean(found))


ENTROPY = math.log2(SPREAD * math.sqrt(2 * math.pi * math.e)) + math.log2(127.5)


@pytest.mark.slow
def test_it_is_the_entropy_of_the_grey_levels(images):
  assert bits(images) == pytest.approx(ENTROPY, abs=0.02)


def test_it_does_not_depend_on_the_solvers_tolerance(images):
  coarse, fine = (bits(images, tolerance=t) for t in (1e-3, 1e-5))
  assert coarse == pytest.approx(fine, abs=5e-3)


def test_the_released_errors_flatter(images):
  """The seventh root of sigma_0: its residual is a 40,000th, so that the bound
  gains nearly half a nat a dimension where it should gain nothing."""
  assert bits(images, legacy_ctm=True) < bits(images) - 0.2


def test_a_wrong_denoiser_takes_more_bits(images):
  def wrong(params, x, sigma, labels):
    return 0.8 * denoise(params, x, sigma, labels)

  found, _ = likelihood.bits_per_dim(
      wrong, None, images, None, jax.random.key(1)
  )
  assert np.mean(found) > ENTROPY + 0.1
