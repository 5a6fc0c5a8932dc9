"""Nearest distances against brute force; is it memorising?"""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import nearest_neighbors


def points(seed, count, dim=16):
  return np.random.default_rng(seed).normal(size=(count, dim))


@pytest.mark.parametrize("block_size", [3, 13, 50, 1000])
def test_nearest_is_brute_force_for_any_block(block_size):
  queries, references = points(0, 50), points(1, 71)
  gaps = queries[:, None] - references[None, :]
  expected = np.sqrt((gaps**2).sum(-1)).min(axis=1)
  found = nearest_neighbors.nearest_distance(queries, references, block_size)
  assert found.dtype == np.float64 and found.shape == (50,)
  np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_copies_are_at_exactly_zero_even_far_from_the_origin():
  references = 1000.0 + points(0, 200, 512).astype(np.float32)
  found = nearest_neighbors.nearest_distance(references[:77], references, 32)
  assert np.all(found == 0.0)


def test_integer_images_do_not_wrap_around():
  queries = np.zeros((1, 2, 2, 1), np.uint8)
  references = np.array([255, 200], np.uint8)[:, None, None, None]
  references = np.broadcast_to(references, (2, 2, 2, 1))
  found = nearest_neighbors.nearest_distance(queries, references)
  np.testing.assert_allclose(found, [400.0])


def test_tolerance_bounds_what_rounding_does_to_equal_distances():
  a, b = 50.0 + points(2, 40, 700), 50.0 + points(3, 40, 700)
  squared, tolerance = nearest_neighbors.squared_distances(a, b)
  exact = ((a[:, None] - b[None, :]) ** 2).sum(-1)
  assert np.all(np.abs(squared - exact) <= tolerance)
  assert np.all(tolerance < 1e-6 * exact)  # and it hides no real difference
  own, _ = nearest_neighbors.squared_distances(a, a)
  assert np.all(own >= 0.0)


def test_memorization_ratio_of_copies_and_of_new_images():
  train, test, new = points(4, 300), points(5, 80), points(6, 80)
  honest = nearest_neighbors.memorization(new, train, test)
  copying = nearest_neighbors.memorization(train[:80] + 1e-3, train, test)
  assert honest["memorization_ratio"] == pytest.approx(1.0, abs=0.1)
  assert copying["memorization_ratio"] < 0.01
  assert copying["median_sample_to_train"] == pytest.approx(4e-3)
  nearest = nearest_neighbors.nearest_distance(test, train)
  assert honest["median_test_to_train"] == np.median(nearest)
  assert honest["memorization_ratio"] == (
    honest["median_sample_to_train"] / honest["median_test_to_train"]
  )


def test_memorization_ratio_without_new_test_images_is_nan():
  train = points(7, 20)
  found = nearest_neighbors.memorization(train + 1.0, train, train[:9])
  assert found["median_test_to_train"] == 0.0 and np.isnan(
    found["memorization_ratio"]
  )


@pytest.mark.parametrize(
  "queries, references, words",
  [
    (np.zeros((2, 3)), np.zeros((2, 4)), "got 3 and 4 values per row"),
    (np.zeros((2, 3)), np.zeros((0, 3)), "references: got shape"),
    (np.zeros((2, 3)), np.full((2, 3), np.inf), "NaN or infinity"),
    (np.zeros((2, 3), np.uint8), np.zeros((2, 3)), "same scale"),
  ],
)
def test_bad_input_is_a_user_error(queries, references, words):
  with pytest.raises(UserError, match=words):
    nearest_neighbors.nearest_distance(queries, references)
