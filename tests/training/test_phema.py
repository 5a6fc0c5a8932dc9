"""Power-function averages against the official numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.training import ema
from bcm_jax.training import phema
from tests import golden

FILE = "edm2_phema"


def expected(name):
  return golden.load(FILE)[f"out/{name}"]


def meta(name):
  return np.asarray(golden.load(FILE).meta[name])


def close(actual, name, rtol=1e-9, atol=0.0):
  np.testing.assert_allclose(actual, expected(name), rtol=rtol, atol=atol)


def test_lengths_and_exponents():
  close(phema.std_to_exp(meta("stds")), "std_to_exp")
  close(
      phema.exp_to_std(expected("std_to_exp")), "exp_to_std", rtol=1e-12
  )
  # The closed form, its uniform limit and shapes.
  assert phema.exp_to_std(0.0) == pytest.approx(phema.LARGEST_STD)
  assert phema.std_to_exp(0.05).shape == ()
  stds = np.array([[0.005, 0.28], [0.1, 0.2]])
  np.testing.assert_allclose(
      phema.exp_to_std(phema.std_to_exp(stds)), stds, rtol=1e-9
  )


@pytest.mark.parametrize("std", [0.0, -0.1, 0.2887, 1.0, np.nan, [0.1, 0.3]])
def test_lengths_out_of_range(std):
  with pytest.raises(errors.UserError, match=r"sigma_rel: got .*0\.2887"):
    phema.std_to_exp(std)


def test_beta():
  times = expected("beta_t_next"), expected("beta_t_delta")
  with jax.enable_x64(True):
    ours = [phema.beta(std, *times) for std in meta("stds")]
  close(ours, "beta")
  # In float32, and traced, what is new keeps its digits only without 1 - beta.
  late = dict(t_next=jnp.float32(1e6), t_delta=jnp.float32(1))
  beta = jax.jit(lambda t: phema.beta(0.05, t, 1.0))(late["t_next"])
  assert beta.dtype == jnp.float32
  exact = 17.97219 * 1e-6
  assert 1 - float(beta) == pytest.approx(exact, rel=1e-2)
  new = phema.update(jnp.float32(0), jnp.float32(1), 0.05, **late)
  assert float(new) == pytest.approx(exact, rel=1e-5)


def test_averages_of_a_run():
  stds, batch = [float(s) for s in meta("instd")], 256

  @jax.jit
  def step(powers, plain, value, images):
    powers = [
        phema.update(average, value, std, images, batch)
        for average, std in zip(powers, stds, strict=True)
    ]
    rate = phema.halflife_beta(images, batch, halflife=5000)
    return powers, ema.update(plain, value, rate)

  track, old = [], []
  with jax.enable_x64(True):
    powers, plain = [jnp.full(4, 1e3)] * 2, jnp.zeros(4)
    for i, value in enumerate(expected("seq"), 1):
      powers, plain = step(powers, plain, value, i * batch)
      track.append(powers)
      old.append(plain)
  close(np.asarray(track), "ema_track", atol=1e-12)
  close(np.asarray(old), "traditional_track", atol=1e-12)


def test_half_life():
  assert phema.halflife_beta(1e6, 500, 500, None) == 0.5
  assert phema.halflife_beta(1e6, 1000, 500, 0.05) == 0.25
  ramped = phema.halflife_beta(1000.0, 100, 500, 0.05)
  assert float(ramped) == pytest.approx(0.5 ** (100 / 50))
  assert phema.halflife_beta(0.0, 100, 500) == 0


def test_learning_rate():
  images = [0, 1e5, 1e6, 1e7, 1e8, 1.4336e8, 2e8, 1e9]
  with jax.enable_x64(True):
    close(phema.learning_rate(jnp.asarray(images), 2048), "lr", rtol=1e-12)
  rate = jax.jit(lambda n: phema.learning_rate(n, 2048))(jnp.int32(10**9))
  assert rate.dtype == jnp.float32
  assert float(rate) == pytest.approx(expected("lr")[-1], rel=1e-6)
  assert phema.learning_rate(1e9, 2048, 0.5, 0, 0) == 0.5


def test_responses():
  ours = [phema.response(50, std, 64) for std in meta("stds")]
  close(ours, "response", atol=1e-18)
  np.testing.assert_array_equal(
      phema.response(50, 0.1, 20), phema.response(50, 0.1, 64)[:20]
  )


def profiles(times):
  """(time, sigma_rel) of both tracked averages at every time."""
  return np.repeat(times, 2), np.tile([0.05, 0.1], len(times))


def test_inner_products_of_profiles():
  stored = expected("in_ofs"), expected("in_std")
  close(phema.correlation(*stored, *stored), "correlation")
  # Against the integral, for one earlier and one later profile.
  s = (np.arange(200_000) + 0.5) / 200_000 * 3

  def density(t, std):
    g = phema.std_to_exp(std)
    return np.where(s < t, (g + 1) * (s / t) ** g / t, 0)

  for a, b in (((2, 0.1), (3, 0.2)), ((3, 0.2), (2, 0.1))):
    numeric = (density(*a) * density(*b)).mean() * 3
    ours = phema.correlation([a[0]], [a[1]], [b[0]], [b[1]])
    assert ours.item() == pytest.approx(numeric, rel=1e-4)


def test_coefficients_are_the_official_ones():
  ours = phema.solve_posthoc_coefficients(
      *(expected(k) for k in ("in_ofs", "in_std", "out_ofs", "out_std"))
  )
  scale = np.abs(expected("coefficients")).max()
  close(ours, "coefficients", rtol=1e-6, atol=1e-9 * scale)
  np.testing.assert_allclose(ours.sum(0), 1, atol=1e-12)
  # Another published case, to six decimals.
  known = (-0.000562, 0.001944, -0.013148, 0.038020, -0.077958, 0.200409,
           -0.264062, 1.115357)
  np.testing.assert_allclose(
      phema.coefficients(*profiles([8, 16, 24, 32]), 32, 0.15), known,
      atol=1e-6,
  )


def test_a_stored_average_is_its_own_reconstruction():
  times, stds = profiles([100, 200, 300, 400, 500])
  for i in (0, 3, 8):
    ours = phema.coefficients(times, stds, times[i], stds[i])
    np.testing.assert_allclose(ours, np.eye(10)[i], atol=1e-9)


def test_snapshots_at_the_start_and_later_ones_are_left_out():
  times, stds = profiles([0, 8, 16, 24, 32, 40])
  order = np.random.default_rng(0).permutation(len(times))
  ours = np.empty(len(times))
  ours[order] = phema.coefficients(times[order], stds[order], 24, 0.15)
  assert not ours[[0, 1, 8, 9, 10, 11]].any()
  np.testing.assert_allclose(
      ours[2:8], phema.coefficients(*profiles([8, 16, 24]), 24, 0.15),
      rtol=1e-8,
  )


@pytest.mark.parametrize("std, count, limit", [
    (0.15, 8, 5e-3), (0.15, 16, 5e-4), (0.25, 16, 2e-2), (0.02, 16, 2.3e-3),
])
@pytest.mark.parametrize("power", [0.3, 1, 2, 5])
def test_averages_of_a_known_path_are_found_again(std, count, limit, power):
  times, stds = profiles((np.arange(count) + 1) / count)

  def average(t, s):  # The mean of x^power under the profile, exactly.
    g = phema.std_to_exp(s)
    return t**power * (g + 1) / (g + power + 1)

  ours = phema.coefficients(times, stds, 1, std) @ average(times, stds)
  assert ours == pytest.approx(average(1, std), rel=limit)


def test_reconstruction_of_trees():
  rng = np.random.default_rng(0)
  weights = np.array([13.0, -25.5, 0, 14.25, -0.75])
  constant = rng.standard_normal(50).astype(np.float32)
  trees = [
      {
          "w": rng.standard_normal((4, 5)).astype(np.float32),
          "half": jnp.asarray(rng.standard_normal(6), jnp.bfloat16),
          "gain": np.float32(rng.standard_normal()),
          "constant": constant,
          "wide": rng.standard_normal(3),
      }
      for _ in weights
  ]
  out = phema.reconstruct(iter(trees), weights)
  for name, leaf in out.items():
    assert isinstance(leaf, np.ndarray)
    exact = sum(
        w * np.asarray(t[name], np.float64)
        for w, t in zip(weights, trees, strict=True)
    )
    assert leaf.dtype == (np.float64 if name == "wide" else np.float32)
    np.testing.assert_allclose(
        leaf, exact, rtol=0, atol=1e-13 if name == "wide" else 2e-5
    )
  np.testing.assert_array_equal(out["constant"], constant)


def test_weights_are_taken_as_they_are():
  # Their sum is 2, not 1.
  out = phema.reconstruct([{"a": np.ones(2)}, {"a": np.zeros(2)}], [3, -1])
  np.testing.assert_array_equal(out["a"], [3, 3])


@pytest.mark.parametrize("times, stds, time, std, match", [
    ([8, 16], [0.1, 0.1], 12, 0.1, r"got 12, .*\(8, 16\)"),
    ([0, 16], [0.1, 0.1], 0, 0.1, r"got 0, .*\(16\)"),
    ([], [], 16, 0.1, "no snapshots"),
    ([8, 8], [0.1, 0.1], 8, 0.1, "two at time 8 with sigma_rel 0.1"),
    ([8, 16], [0.1, 0.1], 16, 0.3, "sigma_rel: got 0.3"),
    ([8, 16], [0.1, 0.4], 16, 0.1, "sigma_rel: got 0.4"),
])
def test_wishes_that_cannot_be_met(times, stds, time, std, match):
  with pytest.raises(errors.UserError, match=match):
    phema.coefficients(times, stds, time, std)


def test_systems_that_cannot_be_solved():
  for args, match in (
      (([], [], [1], [0.1]), "stored averages: got 0"),
      (([0, 1], [0.1, 0.1], [1], [0.1]), "got 0"),
  ):
    with pytest.raises(errors.UserError, match=match):
      phema.solve_posthoc_coefficients(*args)


@pytest.mark.parametrize("trees, weights", [
    (1, [0.5, 0.5]), (3, [0.5, 0.5]), (0, []), (2, [0, 0]),
])
def test_snapshots_and_weights_of_different_number(trees, weights):
  with pytest.raises(errors.UserError, match=f"got {trees} for"):
    phema.reconstruct([{"a": np.ones(2)}] * trees, weights)
