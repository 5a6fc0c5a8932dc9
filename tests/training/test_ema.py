"""Moving averages: the recursion, its start, its dtype."""

import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.training import ema


def test_constant_parameters_are_approached_geometrically():
  rate, n = 0.9, 12
  average, params = {"w": jnp.float32(3)}, {"w": jnp.float32(7)}
  for _ in range(n):
    average = ema.update(average, params, rate)
  expected = rate**n * 3 + (1 - rate**n) * 7
  np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


def test_an_average_of_what_never_moves_stays_bit_for_bit():
  params = {"w": jnp.linspace(0.1, 7, 100)}
  average = ema.start(params)
  for _ in range(20):
    average = ema.update(average, params, 0.9999)
  np.testing.assert_array_equal(average["w"], params["w"])


@pytest.mark.parametrize("rate,expected", [(0.0, 5.0), (1.0, 2.0)])
def test_rates_nought_and_one(rate, expected):
  average = ema.update(
      {"w": jnp.float32(2)}, {"w": jnp.float32(5)}, jnp.float32(rate)
  )
  assert average["w"] == expected


def test_bfloat16_parameters_are_averaged_in_float32():
  params = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(3, jnp.float32)}
  average = ema.start(params)
  assert average["w"].dtype == average["v"].dtype == jnp.float32
  moved = {"w": params["w"] * 2, "v": params["v"] * 2}
  average = ema.update(average, moved, 0.9999)
  assert average["w"].dtype == jnp.float32
  # A step of 1e-4, which bfloat16 would round away.
  np.testing.assert_allclose(average["w"], 1.0001, rtol=1e-6)


def test_a_first_average_is_a_copy():
  params = {"w": jnp.ones(3)}
  average = ema.start(params)
  assert (
      average["w"].unsafe_buffer_pointer()
      != params["w"].unsafe_buffer_pointer()
  )


def test_warm_up():
  rates = [float(ema.warmed_rate(0.999, jnp.int32(n))) for n in (1, 8, 10**6)]
  np.testing.assert_allclose(rates, [2 / 11, 9 / 18, 0.999], rtol=1e-6)
