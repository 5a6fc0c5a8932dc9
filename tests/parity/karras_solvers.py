"""Solvers of the consistency-models code that the package does not offer."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import process
from bcm_jax.diffusion import solvers

NAMES = ("euler", "heun", "dpm2", "ancestral")


def solve(denoiser, x, sigmas, solver, churn, noise):
  """diffusion.solvers.solve, also with 'dpm2' and 'ancestral'."""
  if solver == "ancestral":
    return _ancestral(denoiser, x, np.asarray(sigmas, np.float64), noise)
  with mock.patch.dict(solvers._STEPS, dpm2=_dpm2_step):
    return solvers.solve(denoiser, x, sigmas, solver, churn, noise)


def _dpm2_step(denoiser, x, s, s_next):
  """Midpoint rule, with the midpoint in sigma^(1/3)."""
  d = process.ode_velocity(x, s, denoiser(x, s))
  mid = ((s ** (1 / 3) + s_next ** (1 / 3)) / 2) ** 3
  x_mid = x + (mid - s) * d
  d_mid = process.ode_velocity(x_mid, mid, denoiser(x_mid, mid))
  return x + (s_next - s) * d_mid


def ancestral_levels(
    s: np.ndarray | float, s_next: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (down, up) with down^2 + up^2 = s_next^2.

  A step goes down to `down` and adds noise of deviation `up` (DDPM's posterior
  variance, as in k-diffusion).
  """
  dtype = np.result_type(np.asarray(s), np.float32)
  s, s_next = np.asarray(s, dtype), np.asarray(s_next, dtype)
  up = np.minimum(s_next, np.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
  return np.sqrt(s_next**2 - up**2), up


def _ancestral(denoiser, x, sigmas, noise):
  down, up = ancestral_levels(sigmas[:-1], sigmas[1:])

  def body(x, inputs):
    i, s, s_down, s_up = inputs
    return solvers.euler_step(denoiser, x, s, s_down) + s_up * noise(i), None

  levels = [jnp.asarray(a, x.dtype) for a in (sigmas[:-1], down, up)]
  return jax.lax.scan(body, x, (jnp.arange(len(sigmas) - 1), *levels))[0]
