"""Preconditionings: identities, the exact Gaussian map, reference numbers."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning as pre
from tests import gaussian
from tests import golden

EPS = 0.002
FORMS = {
    "edm": pre.EDM(),
    "cm": pre.ConsistencyBoundary(),
    "bcm": pre.Bidirectional(),
}
# Pairs in both directions, from one end of the range to the other.
T = np.array([80.0, 0.002, 1.3, 0.3, 2.5, 17.0])
U = np.array([0.002, 80.0, 0.7, 0.9, 2.4, 30.0])


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def images(seed=0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((len(T), 4, 4, 2)).astype(dtype) * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", [pre.Bidirectional(), pre.Trajectory()])
def test_no_jump_is_the_identity_for_any_network(form, dtype):
  x, t = images(dtype=np.float32), jnp.asarray(T, jnp.float32)
  f = jnp.asarray(images(1), dtype)
  out = pre.precondition(lambda *_: f, form, x, t, t)
  assert out.dtype == jnp.float32
  np.testing.assert_array_equal(out, x)
  assert np.abs(pre.precondition(lambda *_: f, form, x, t, t / 2) - x).max() > 1


def test_consistency_function_is_the_identity_at_sigma_min():
  x, t = images(dtype=np.float32), jnp.full(len(T), EPS, jnp.float32)
  form = pre.ConsistencyBoundary()
  out = pre.precondition(lambda *_: images(1), form, x, t, t)
  np.testing.assert_array_equal(out, x)


def test_a_jump_is_an_euler_step_of_the_denoiser(x64):
  x, f = images(), images(1)

  def at(form, u):
    return pre.precondition(lambda *_: f, form, x, jnp.asarray(T), u)

  to_zero = at(pre.Bidirectional(), jnp.zeros(len(T)))
  r = (U / T)[:, None, None, None]
  expected = r * x + (1 - r) * to_zero
  out = at(pre.Bidirectional(), jnp.asarray(U))
  # r is 40,000 on the way from 0.002 to 80: errors are relative to that.
  np.testing.assert_allclose(out / r, expected / r, rtol=1e-11, atol=1e-12)
  np.testing.assert_allclose(to_zero, at(pre.EDM(), 0 * T), rtol=1e-14)


def test_trajectory_form_is_the_bidirectional_form(x64):
  ours = pre.Trajectory(pre.EDM(0.7))(T, U)
  for a, b in zip(ours, pre.Bidirectional(0.7)(T, U), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-11)


def test_bidirectional_at_sigma_min_is_nearly_the_consistency_form(x64):
  t = np.geomspace(EPS, 80, 200)
  bcm, cm = pre.Bidirectional()(t, EPS), pre.ConsistencyBoundary()(t)
  np.testing.assert_allclose(bcm.c_out, cm.c_out, rtol=1e-14)
  gap = np.abs(bcm.c_skip - cm.c_skip) * np.sqrt(t**2 + 0.25)
  assert gap.max() <= EPS
  assert gap.argmax() == len(t) - 1
  np.testing.assert_allclose(gap.max(), EPS, rtol=1e-3)


@pytest.mark.parametrize("form", [pre.Bidirectional(), pre.Trajectory()])
def test_small_jumps_lose_no_digits(form):
  t = np.linspace(0.01, 80, 500).astype(np.float32)
  u = np.nextafter(np.nextafter(t, np.float32(0)), np.float32(0))
  c_out = form(t, u).c_out
  assert c_out.dtype == jnp.float32
  t, u = t.astype(np.float64), u.astype(np.float64)
  expected = (t - u) * 0.5 / np.sqrt(t**2 + 0.25)
  if isinstance(form, pre.Trajectory):
    expected = (t - u) / t * (t * 0.5 / np.sqrt(t**2 + 0.25))
  np.testing.assert_allclose(c_out, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["bcm", "edm", "cm"])
def test_factors_are_at_least_float32_and_keep_float64(name, x64):
  for given, expected in (
      (jnp.bfloat16, jnp.float32),
      (jnp.float32, jnp.float32),
      (jnp.float64, jnp.float64),
  ):
    level = jnp.asarray([1.5, 0.7], given)
    for c in FORMS[name](level, level / 2):
      assert c.dtype == expected
    x = jnp.ones((2, 3), given)
    out = pre.precondition(lambda x, *_: x, FORMS[name], x, level, level)
    assert out.dtype == expected
    for c_noise in (pre.adm_c_noise, pre.edm_c_noise):
      assert c_noise(level).dtype == expected


@pytest.mark.parametrize("factor", ["c_skip", "c_out", "c_in"])
@pytest.mark.parametrize("name", ["edm", "cm", "bcm"])
def test_factors_are_the_reference_ones(name, factor):
  g = golden.load("sched_scalings")
  levels = g["in/sigma"], g["in/sigma_end"]
  key = f"{name}_{factor}"
  golden.close(getattr(FORMS[name](*levels), factor), g, key)
  with jax.enable_x64(True):
    levels = [v.astype(np.float64) for v in levels]
    golden.close(getattr(FORMS[name](*levels), factor), g, key, rel=1e-14)


def test_conditioning_values(x64):
  g = golden.load("sched_scalings")
  sigma = g["in/sigma"].astype(np.float64)
  golden.close(pre.adm_c_noise(sigma), g, "rescaled_t", rel=1e-14)
  np.testing.assert_allclose(
      pre.edm_c_noise(sigma), np.log(sigma) / 4, rtol=1e-14
  )
  assert np.isfinite(pre.adm_c_noise(0.0)) and np.isfinite(pre.edm_c_noise(0.0))


def test_network_gets_scaled_image_and_both_conditioning_values(x64):
  seen = []
  x = images()
  network = lambda *a: seen.extend(a) or jnp.zeros_like(x)  # noqa: E731
  pre.precondition(network, pre.Bidirectional(0.7), x, T, U, pre.edm_c_noise)
  scale = np.sqrt(T**2 + 0.49)[:, None, None, None]
  np.testing.assert_allclose(seen[0], x / scale, rtol=1e-13)
  np.testing.assert_allclose(seen[1], np.log(T) / 4, rtol=1e-13)
  np.testing.assert_allclose(seen[2], np.log(U) / 4, rtol=1e-13)


@pytest.mark.parametrize(
    "form", [pre.Bidirectional(), pre.Trajectory(pre.EDM())]
)
def test_two_time_forms_realise_the_gaussian_flow_map(form, x64):
  x = images()
  out = pre.precondition(gaussian.network, form, x, T, U)
  np.testing.assert_allclose(out, gaussian.phi(x, T, U), rtol=1e-9)


def test_denoiser_forms_realise_the_gaussian_closed_forms(x64):
  x, a = images(), (T**2 + 0.25)[:, None, None, None]
  out = pre.precondition(lambda x, *_: 0 * x, pre.EDM(), x, T, U)
  np.testing.assert_allclose(out, 0.25 / a * x, rtol=1e-12)

  def to_zero(x_in, c_noise, _):
    t = jnp.exp(c_noise / 250)[:, None, None, None]
    return x_in * t / (jnp.sqrt(t**2 + 0.25) + 0.5)

  form = pre.ConsistencyBoundary(sigma_min=0.0)
  out = pre.precondition(to_zero, form, x, T, U)
  np.testing.assert_allclose(out, gaussian.phi(x, T, 0 * T), rtol=1e-10)


def test_gaussian_map_composes_and_inverts(x64):
  x, f = images(), gaussian.flow_map
  mid = np.sqrt(T * U) * 1.7
  direct = f(x, T, U)
  np.testing.assert_allclose(f(f(x, T, mid), mid, U), direct, rtol=1e-9)
  np.testing.assert_allclose(f(direct, U, T), x, rtol=1e-9)


def test_one_step_from_noise_has_the_closed_form_spread(x64):
  z = images()
  t, u = np.full(len(T), 80.0), np.full(len(T), EPS)
  spread = np.sqrt(0.25 + EPS**2) * np.sqrt(80**2 / (0.25 + 80**2))
  np.testing.assert_allclose(
      gaussian.flow_map(80 * z, t, u), spread * z, rtol=1e-9
  )


@pytest.mark.parametrize("inner", [
    pre.EDM(0.6), pre.ConsistencyBoundary(0.6, 0.01), pre.Plain(0.6)
])
@pytest.mark.parametrize("outer", typing.get_args(pre.OuterSkip))
def test_trajectories_have_the_slope_of_their_denoiser(inner, outer):
  """dG/du at u = t is (x - D) / t for any F: matches the ODE."""
  form = pre.Trajectory(inner, outer, 0.6, 0.01)
  x, f = 1.3, -0.7
  with jax.enable_x64(True):
    for t in (0.05, 0.8, 20.0):

      def g(u, t=t):
        c = form(jnp.float64(t), u)
        return c.c_skip * x + c.c_out * f

      c = form.denoiser(jnp.float64(t))
      d = c.c_skip * x + c.c_out * f
      slope = jax.grad(g)(jnp.float64(t))
      np.testing.assert_allclose(slope, (x - d) / t, rtol=1e-9)
      if outer != "euler_variance_mixed":
        np.testing.assert_allclose(g(jnp.float64(t)), x, rtol=1e-12)


def test_parametrizations_of_ctm_by_hand():
  t, u, sd, low = 2.0, 0.5, 0.5, 0.002
  v = np.sqrt(((u - low) ** 2 + sd**2) / ((t - low) ** 2 + sd**2))
  inner = pre.Plain(sd)
  for outer, skip in (
      ("euler", u / t), ("variance", v),
      ("euler_variance_mixed", (u + v) / (t + 1)),
  ):
    c = pre.Trajectory(inner, outer, sd, low)(t, u)
    np.testing.assert_allclose(c.c_skip, skip, rtol=1e-6)
    np.testing.assert_allclose(c.c_out, 1 - u / t, rtol=1e-6)
    np.testing.assert_allclose(c.c_in, 1 / np.hypot(t, sd), rtol=1e-6)
