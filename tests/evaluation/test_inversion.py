"""Baselines of inversion on Gaussian data, where everything is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import schedules
from bcm_jax.evaluation import inversion

SD = 0.5
LOW, HIGH = 0.002, 80.0


def flow_map(form):
  """f of a network whose F is 0: EDM's optimal denoiser of N(0, SD^2)."""

  def f(x, t, u, labels=None):
    del labels
    c_skip = form(t, u)[0]
    return c_skip[:, None] * x

  return f


@pytest.mark.parametrize("form", ["EDM", "Bidirectional"])
def test_a_flow_map_without_end_level_is_a_denoiser(form):
  f = flow_map(getattr(preconditioning, form)(SD))
  x = jnp.linspace(-1, 1, 12).reshape(3, 4)
  denoise = inversion.denoiser_of(f, None)
  for sigma in (0.1, 2.0, 40.0):
    np.testing.assert_allclose(
        denoise(x, jnp.float32(sigma)), x * SD**2 / (SD**2 + sigma**2),
        rtol=1e-5,
    )


def round_trip(n, solver, noise=LOW):
  f = flow_map(preconditioning.EDM(SD))
  x = SD * jax.random.normal(jax.random.key(0), (500, 4))
  up = schedules.karras_sigmas(n + 1, noise, HIGH)
  down = schedules.karras_sigmas(n + 1, LOW, HIGH)[::-1]
  latents, back = inversion.ode_round_trip(
      f, x, None, up, down, solver
  )
  return x, latents, back


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_inversions_converge_to_the_exact_flow_at_the_solvers_order(
    solver, order
):
  errors = []
  for n in (64, 128, 256):
    x, latents, _ = round_trip(n, solver)
    exact = x * np.sqrt((SD**2 + HIGH**2) / (SD**2 + LOW**2))
    errors.append(float(jnp.max(jnp.abs(latents / exact - 1))))
  rates = np.log2(np.divide(errors[:-1], errors[1:]))
  np.testing.assert_allclose(rates, order, atol=0.25)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_more_evaluations_reconstruct_better(solver):
  mse = []
  for n in (4, 16, 64, 256):
    x, _, back = round_trip(n, solver)
    mse.append(float(jnp.mean((back - x) ** 2)))
  assert mse == sorted(mse, reverse=True)
  assert mse[-1] < 1e-3 * SD**2
