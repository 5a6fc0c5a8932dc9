"""Guidance of denoisers and of maps that are Euler's step of one."""

import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.diffusion import solvers
from bcm_jax.sampling import guidance
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan

LEVELS = sampling_plan.NoiseRange()
GRID = (80.0, 10.0, 2.0, 0.5, 0.002)
X = jnp.linspace(-2, 2, 6).reshape(3, 2)
LABELS = jnp.array([0, 1, 2])


def denoiser(shift):
  def d(x, t, labels):
    return x / (1 + t[:, None]) + shift * (labels[:, None] + 2)

  return d


def euler(d):
  def f(x, t, u, labels):
    ratio = (u / t)[:, None]
    return ratio * x + (1 - ratio) * d(x, t, labels)

  return f


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.7])
def test_it_extrapolates(weight):
  t = jnp.array([1.0, 2.0, 3.0])
  main, guide = denoiser(0.3), denoiser(-0.1)
  out = guidance.guided(main, guide, weight)(X, t, LABELS)
  expected = weight * main(X, t, LABELS) + (1 - weight) * guide(X, t, LABELS)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  if weight == 1:
    np.testing.assert_allclose(out, main(X, t, LABELS), rtol=1e-6)


def test_a_guided_step_is_the_step_of_the_guided_denoiser():
  t, u = jnp.full(3, 2.0), jnp.full(3, 0.5)
  main, guide = denoiser(0.3), denoiser(-0.1)
  of_steps = guidance.guided(euler(main), euler(guide), 1.7)
  of_denoisers = euler(guidance.guided(main, guide, 1.7))
  np.testing.assert_allclose(
      of_steps(X, t, u, LABELS), of_denoisers(X, t, u, LABELS), rtol=1e-5,
      atol=1e-6,
  )


def test_without_class_is_label_minus_one():
  t = jnp.ones(3)
  out = guidance.without_class(denoiser(0.3))(X, t, LABELS)
  np.testing.assert_array_equal(out, denoiser(0.3)(X, t, jnp.full(3, -1)))


@pytest.mark.parametrize("interval, guided", [
    ((), (True, True, True, True, True)),
    ((0.5, 10.0), (False, True, True, False, False)),
    ((100.0, 200.0), (False,) * 5),
])
def test_only_levels_of_the_interval_are_guided(interval, guided):
  plan = sampling_plan.guide(
    sampling_plan.ode(GRID, solvers.Churn(), True, LEVELS), *interval
  )
  assert tuple(s.guided for s in plan.steps) == guided
  calls = {"plain": 0, "guided": 0}

  def counted(name):
    def f(x, t, u, labels):
      calls[name] += 1
      return euler(denoiser(0.1))(x, t, u, labels)

    return f

  samplers.run(plan, counted("plain"), X, LABELS, guided_map=counted("guided"))
  assert calls["guided"] == plan.guide_nfe
  assert sum(calls.values()) == plan.nfe == 9
  assert ("of the guide" in str(plan)) == any(guided)


def test_a_guided_plan_without_a_guide_is_an_error():
  plan = sampling_plan.guide(
    sampling_plan.ode(GRID, solvers.Churn(), False, LEVELS)
  )
  with pytest.raises(ValueError, match="guided_map"):
    samplers.run(plan, euler(denoiser(0.1)), X, LABELS)


# Gamma-sampling, the other new plan -------------------------------------------


def test_gamma_spans_from_ancestral_to_multistep():
  mid = (10.0, 2.0)
  zero, one = (sampling_plan.gamma_sampling(mid, g, LEVELS) for g in (0.0, 1.0))
  assert zero.steps == sampling_plan.ancestral(mid, LEVELS).steps
  expected = sampling_plan.cm_multistep(mid, LEVELS).steps
  assert len(one.steps) == len(expected)
  for mine, theirs in zip(one.steps, expected, strict=True):
    assert type(mine) is type(theirs)
    for name in ("t", "u", "scale", "level"):
      if hasattr(mine, name):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name))


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_gamma_out_of_range(gamma):
  with pytest.raises(errors.UserError, match="gamma"):
    sampling_plan.gamma_sampling((1.0,), gamma, LEVELS)
