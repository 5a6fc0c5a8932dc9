"""Solvers of the probability-flow ODE, on Gaussians and reference numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from tests import gaussian
from tests import golden

ORDERS = {"euler": 1, "heun": 2}
# An anisotropic Gaussian that is not at the origin.
MEAN = np.array([0.3, -1.0, 2.0])
VARIANCES = np.array([0.01, 0.25, 4.0])
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def denoise(x, t):
  """E[x_0 | x_t] = mu + C (C + t^2)^-1 (x - mu)."""
  return MEAN + ((x - MEAN) @ BASIS * (VARIANCES / (VARIANCES + t**2))) @ (
      BASIS.T
  )


def exact(x, t, u):
  factor = np.sqrt((VARIANCES + u**2) / (VARIANCES + t**2))
  return MEAN + ((x - MEAN) @ BASIS * factor) @ BASIS.T


@pytest.mark.parametrize("way", ["generate", "invert"])
@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver, way, x64):
  x = np.random.default_rng(1).standard_normal((8, 3)) * 3
  error = []
  for n in (64, 128):
    sigmas = schedules.karras_sigmas(n + 1, 0.05, 5.0)
    sigmas = sigmas[::-1] if way == "generate" else sigmas
    out = solvers.solve(denoise, jnp.asarray(x), sigmas, solver)
    expected = exact(x, sigmas[0], sigmas[-1])
    error.append(np.abs(out - expected).max() / np.abs(expected).max())
  assert error[1] < 0.05
  assert np.log2(error[0] / error[1]) == pytest.approx(
      ORDERS[solver], abs=0.15
  )


@pytest.mark.parametrize("solver", ORDERS)
def test_there_and_back(solver, x64):
  x = np.random.default_rng(1).standard_normal((8, 3))
  sigmas = schedules.karras_sigmas(400, 0.05, 20.0)
  up = solvers.solve(denoise, jnp.asarray(x), sigmas, solver)
  back = solvers.solve(denoise, up, sigmas[::-1], solver)
  assert np.abs(up - x).max() > 1
  atol = {1: 0.1, 2: 2e-3}[ORDERS[solver]]
  np.testing.assert_allclose(back, x, atol=atol)


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("solver", ORDERS)
def test_nfe_is_the_number_of_calls(solver, to_zero):
  sigmas = schedules.karras_sigmas(6)[::-1]
  sigmas = np.append(sigmas, 0.0) if to_zero else sigmas
  levels = []

  def counted(x, t):
    levels.append(float(t))
    return x / 2

  with jax.disable_jit():
    out = solvers.solve(counted, jnp.ones((1, 2)), sigmas, solver)
  saved = solver == "heun" and to_zero
  assert len(levels) == (len(sigmas) - 1) * ORDERS[solver] - saved
  assert min(levels) > 0
  assert np.isfinite(out).all()
  assert levels[0] == 80


def test_churn_keeps_the_marginal_variance():
  n = 20_000
  z = jax.random.normal(jax.random.key(0), (n, 1))
  sigmas = schedules.karras_sigmas(65, 0.1, 80.0)[::-1]
  keys = jax.random.split(jax.random.key(1), 64)
  sd2 = gaussian.SD**2

  def spread(s_churn, s_noise=1.0):
    out = solvers.solve(
        lambda x, t: x * sd2 / (sd2 + t**2),
        jnp.sqrt(sd2 + 80**2) * z, sigmas, "heun",
        solvers.Churn(s_churn, s_noise=s_noise),
        lambda i: jax.random.normal(keys[i], (n, 1)),
    )
    return out, float(out.var() / (sd2 + 0.01))

  calm, ratio = spread(0.0)
  assert ratio == pytest.approx(1, abs=0.03)
  stirred, ratio = spread(20.0)
  assert ratio == pytest.approx(1, abs=0.03)
  assert abs(np.corrcoef(calm[:, 0], stirred[:, 0])[0, 1]) < 0.5
  # The test sees a factor that is not as it should be.
  assert spread(20.0, s_noise=1.1)[1] > 1.06


def test_no_churn_is_deterministic():
  x = jax.random.normal(jax.random.key(0), (4, 3))
  sigmas = schedules.karras_sigmas(6)[::-1]
  f = lambda x, t: x / (1 + t)  # noqa: E731
  plain = solvers.solve(f, x, sigmas)
  noisy = lambda i: jax.random.normal(jax.random.key(i), x.shape)  # noqa: E731
  outside = solvers.Churn(s_churn=9.0, s_tmin=100.0)
  for churn in (solvers.Churn(0.0), outside):
    np.testing.assert_array_equal(
        plain, solvers.solve(f, x, sigmas, "heun", churn, noisy)
    )
  with pytest.raises(ValueError, match="noise"):
    solvers.solve(f, x, sigmas, "heun", solvers.Churn(9.0))


def test_rise_of_the_noise_level():
  churn = solvers.Churn(s_churn=8.0, s_tmin=0.05, s_tmax=50.0)
  assert churn.gamma(1.0, 40) == pytest.approx(0.2)
  assert churn.gamma(1.0, 2) == pytest.approx(np.sqrt(2) - 1)
  assert churn.gamma(0.05, 40) > 0 and churn.gamma(50.0, 40) > 0
  assert churn.gamma(0.04, 40) == churn.gamma(51.0, 40) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name, solver, steps", [
    ("ks_euler", "euler", "anc"),
    ("ks_heun", "heun", "heun"),
    ("ks_heun_noclip", "heun", "heun"),
    ("ks_heun_churn", "heun", "heun"),
])
def test_solvers_on_a_network_are_the_reference_ones(name, solver, steps, x64):
  g = golden.load("bcm_samplers")
  raw = golden.raw_network("bcm_unet", "float64")
  clip = 1.0 if name != "ks_heun_noclip" else np.inf

  def denoiser(x, t):
    # The compiled network takes four images, the file has two.
    x, t = jnp.concatenate([x, x]), jnp.full(4, t)
    y = np.tile(g["in/y"], 2)
    out = preconditioning.precondition(
        lambda *a: raw(*a, y), preconditioning.Bidirectional(), x, t,
        jnp.full(4, 0.002),
    )
    return jnp.clip(out[:2], -clip, clip)

  churn = solvers.Churn()
  if name == "ks_heun_churn":
    churn = solvers.Churn(**g.meta["heun_churn"])
  noise = np.moveaxis(g["in/zs"].astype(np.float64), 2, -1)
  sigmas = schedules.karras_sigmas(g.meta["params"][steps])[::-1]
  with jax.disable_jit():
    out = solvers.solve(
        denoiser, 80 * jnp.asarray(g.image("in/zT")), np.append(sigmas, 0.0),
        solver, churn, lambda i: noise[int(i)],
    )
  golden.close(jnp.clip(out, -1, 1), g, name, rel=1e-10)
