"""The variance-exploding process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import process
from bcm_jax.diffusion import solvers

T = np.array([80.0, 1.0, 0.4])
T2 = np.array([70.0, 0.002, 0.3])


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def pair():
  rng = np.random.default_rng(0)
  return rng.standard_normal((2, 3, 4, 4, 1))


def test_noise_has_the_level_of_its_example(x64):
  x0, z = pair()
  out = process.add_noise(x0, T, z)
  for i, t in enumerate(T):
    np.testing.assert_allclose(out[i], x0[i] + t * z[i], rtol=1e-14)
  np.testing.assert_allclose(
      process.add_noise(x0, 2.0, z), x0 + 2 * z, rtol=1e-14
  )


@pytest.mark.parametrize("step", [solvers.euler_step, solvers.heun_step])
def test_a_step_with_known_image_stays_on_its_line(step, x64):
  x0, z = pair()
  t, t2 = (process.expand(jnp.asarray(v), 4) for v in (T, T2))
  x_t = process.add_noise(x0, T, z)
  out = step(lambda x, s: jnp.asarray(x0), x_t, t, t2)
  np.testing.assert_allclose(
      out, process.add_noise(x0, T2, z), rtol=1e-10, atol=1e-12
  )


def test_noise_of_an_example_is_its_own():
  keys = jax.random.split(jax.random.key(0), 4)
  x = jnp.zeros((4, 3, 3, 1))
  together = process.normal_like(keys, x)
  apart = [process.normal_like(keys[i:i + 1], x[:1])[0] for i in range(4)]
  np.testing.assert_array_equal(together, np.stack(apart))
  assert np.unique(together).size == together.size


def test_noise_is_standard_normal():
  keys = jax.random.split(jax.random.key(1), 50)
  z = process.normal_like(keys, jnp.zeros((50, 1000)))
  assert z.dtype == jnp.float32
  assert abs(float(z.mean())) < 0.02
  assert abs(float(z.std()) - 1) < 0.02
