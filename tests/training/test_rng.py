"""Keys: one for every (seed, stream, step, position), and no two the same."""

import jax
import numpy as np
import pytest

from bcm_jax.training import rng

STREAMS = (
    "t", "u", "noise", "dropout", "flip", "init/student", "init/critic",
    "sample", "eval", "data",
)


def bits(keys) -> np.ndarray:
  return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def test_a_key_is_a_function_of_its_four_coordinates():
  index = np.arange(5)
  first = bits(rng.example_keys(1, "noise", 7, index))
  np.testing.assert_array_equal(
      first, bits(rng.example_keys(1, "noise", np.int32(7), index))
  )
  # Not of the neighbours in the batch.
  np.testing.assert_array_equal(
      first[[3, 1]], bits(rng.example_keys(1, "noise", 7, index[[3, 1]]))
  )


@pytest.mark.parametrize(
    "other",
    [(2, "noise", 7), (1, "t", 7), (1, "noise", 8)],
    ids=["seed", "stream", "step"],
)
def test_every_coordinate_matters(other):
  index = np.arange(100)
  a, b = bits(rng.example_keys(1, "noise", 7, index)), bits(
      rng.example_keys(*other, index)
  )
  assert not {tuple(k) for k in a} & {tuple(k) for k in b}


@pytest.mark.slow
def test_no_two_keys_of_a_hundred_thousand_collide():
  index, steps = np.arange(100), np.arange(50)
  keys = jax.vmap(rng.example_keys, in_axes=(None, None, 0, None))
  every = [
      bits(keys(seed, stream, steps, index))
      for seed in (0, 1)
      for stream in STREAMS
  ]
  every = np.concatenate(every)
  assert len(every) == 100_000
  assert len(np.unique(every, axis=0)) == len(every)


def test_neighbouring_keys_give_independent_draws():
  # One draw from each of two streams at the same step and position.
  index = np.arange(4000)
  draws = np.stack([
      jax.vmap(jax.random.normal)(rng.example_keys(0, s, step, index))
      for s, step in (("t", 0), ("u", 0), ("t", 1))
  ])
  correlation = np.corrcoef(draws) - np.eye(3)
  assert np.abs(correlation).max() < 4 / np.sqrt(len(index))
  np.testing.assert_allclose(draws.std(axis=1), 1, atol=0.05)
