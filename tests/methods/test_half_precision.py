"""Consistency residuals of a trained network in bfloat16 and float32."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcm_jax
from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.export import model_folder

_FOLDER = pathlib.Path(bcm_jax.__file__).parent / "networks" / "digits"
_BATCH = 32


@pytest.fixture(scope="module")
def residual():
  """(N, level, options of the network) -> f(x_t, t) - f(x_r, r), [B, D].

  t and r < t are neighbors on the grid of N levels, near a level.
  """
  experiment, params, _ = model_folder.load(str(_FOLDER))
  method = experiment.method
  batch = experiment.source("train").fetch(np.arange(_BATCH))
  images = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
  z = jax.random.normal(jax.random.key(0), images.shape)

  def compute(n, level, **options):
    network = method.network.clone(**options)
    part = dataclasses.replace(method, network=network)
    grid = schedules.karras_sigmas(n, method.sigma_min, method.sigma_max)
    i = int(np.argmin(np.abs(grid - level)))

    @jax.jit
    def f(t):
      t = jnp.full(_BATCH, t)
      end = jnp.full(_BATCH, method.sigma_min)
      x = process.add_noise(images, t, z)
      return part.f(params, x, t, end, jnp.asarray(batch["label"]))

    difference = np.asarray(f(grid[i])) - np.asarray(f(grid[i - 1]))
    return difference.reshape(_BATCH, -1).astype(np.float64)

  return compute


def cosine(a, b):
  norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  return float(np.mean(np.sum(a * b, axis=1) / norms))


@pytest.mark.slow
@pytest.mark.parametrize("n, level", [(161, 0.1), (1281, 0.02), (1281, 0.1)])
def test_residuals_in_bfloat16_are_those_in_float32(residual, n, level):
  exact = residual(n, level)
  assert cosine(residual(n, level, dtype="bfloat16"), exact) > 0.99
  if n == 1281:  # The same with all levels in bfloat16 is mostly rounding.
    rounded = residual(n, level, dtype="bfloat16", float32_levels=0)
    assert cosine(rounded, exact) < 0.7
