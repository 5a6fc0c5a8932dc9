"""Plans: their steps, their printed form, their errors."""

import math

import pytest

from bcm_jax import errors
from bcm_jax.sampling import sampling_plan

LEVELS = sampling_plan.NoiseRange()


def times(plan):
  """The jumps of a plan as pairs."""
  return [(s.t, s.u) for s in plan.steps if isinstance(s, sampling_plan.Jump)]


def noises(plan):
  return [
    (s.scale, s.level)
    for s in plan.steps
    if isinstance(s, sampling_plan.AddNoise)
  ]


@pytest.mark.parametrize(
  "mid, expected",
  [
    ((), [(80, 0.002)]),
    ((2.4,), [(80, 2.4), (2.4, 0.002)]),
    ((9.0, 1.2), [(80, 9.0), (9.0, 1.2), (1.2, 0.002)]),
  ],
)
def test_ancestral(mid, expected):
  plan = sampling_plan.ancestral(mid, LEVELS)
  assert times(plan) == expected and not noises(plan)
  assert (plan.start, plan.end, plan.nfe) == (80, 0.002, len(mid) + 1)
  assert plan.name == ("ancestral" if mid else "onestep")


def test_zigzag():
  plan = sampling_plan.zigzag([(0.1, 1.2), (0.12, 0.4)], LEVELS)
  jump, noise = sampling_plan.Jump, sampling_plan.AddNoise
  assert plan.steps == (
    jump(80, 0.002),
    noise(0.1, 0.1),
    jump(0.1, 1.2),
    jump(1.2, 0.002),
    noise(0.12, 0.12),
    jump(0.12, 0.4),
    jump(0.4, 0.002),
  )
  assert plan.nfe == 5
  assert (
    sampling_plan.zigzag((), LEVELS).steps
    == sampling_plan.ancestral((), LEVELS).steps
  )


def test_mixture_is_ancestral_then_zigzag():
  plan = sampling_plan.mixture((3.0,), [(0.12, 0.4)], LEVELS)
  zigzag = sampling_plan.zigzag([(0.12, 0.4)], LEVELS)
  assert (
    plan.steps
    == sampling_plan.ancestral((3.0,), LEVELS).steps + zigzag.steps[1:]
  )
  assert plan.nfe == 4


def test_multistep_adds_the_missing_variance():
  plan = sampling_plan.cm_multistep((10.0, 0.5), LEVELS)
  assert times(plan) == [(80, 0.002), (10.0, 0.002), (0.5, 0.002)]
  for scale, level in noises(plan):
    assert math.hypot(scale, 0.002) == pytest.approx(level)
  assert [level for _, level in noises(plan)] == [10.0, 0.5]


@pytest.mark.parametrize("mid", [(), (15.0,), (1.0, 15.0)])
def test_inversion(mid):
  plan = sampling_plan.inversion(0.07, mid, LEVELS)
  ladder = (0.07, *mid, 80.0)
  assert times(plan) == list(zip(ladder, ladder[1:], strict=False))
  assert noises(plan) == [(0.07, 0.07)]
  assert isinstance(plan.steps[0], sampling_plan.AddNoise)
  assert (plan.start, plan.end, plan.nfe) == (0.002, 80, len(mid) + 1)


def test_plans_keep_to_the_levels_of_the_network():
  levels = sampling_plan.NoiseRange(0.01, 40.0)
  assert times(sampling_plan.ancestral((1.0,), levels)) == [
    (40, 1.0),
    (1.0, 0.01),
  ]
  assert sampling_plan.inversion(0.07, (), levels).end == 40


def test_printed_plan():
  assert str(sampling_plan.zigzag([(0.1, 1.2)], LEVELS)).splitlines() == [
    "zigzag: 3 NFE, 80 -> 0.002",
    "   1. jump   80 -> 0.002  (generate)",
    "   2. noise  + 0.1 z  (level 0.1)",
    "   3. jump   0.1 -> 1.2  (invert)",
    "   4. jump   1.2 -> 0.002  (generate)",
  ]


def test_plan_that_ends_in_noise():
  plan = sampling_plan.Plan("noise", 0.002, (sampling_plan.AddNoise(0.1, 0.1),))
  assert (plan.end, plan.nfe) == (0.1, 0)


@pytest.mark.parametrize(
  "make, value",
  [
    (lambda t: sampling_plan.ancestral((t,), LEVELS), 80.5),
    (lambda t: sampling_plan.ancestral((t,), LEVELS), 0.001),
    (lambda t: sampling_plan.ancestral((t,), LEVELS), math.nan),
    (lambda t: sampling_plan.ancestral((t,), LEVELS), math.inf),
    (lambda t: sampling_plan.cm_multistep((t,), LEVELS), 0.0),
    (lambda t: sampling_plan.inversion(t, (), LEVELS), -1.0),
    (lambda t: sampling_plan.inversion(0.07, (t,), LEVELS), 100.0),
    (lambda t: sampling_plan.zigzag([(t, 1.0)], LEVELS), 0.001),
    (lambda t: sampling_plan.zigzag([(0.1, t)], LEVELS), 81.0),
  ],
)
def test_level_outside_the_trained_ones(make, value):
  with pytest.raises(errors.UserError) as caught:
    make(value)
  message = str(caught.value)
  assert f"{value:g}" in message and "[0.002, 80]" in message
  assert "\n" not in message


@pytest.mark.parametrize(
  "make, times",
  [
    (lambda: sampling_plan.ancestral((1.0, 2.5), LEVELS), "80, 1, 2.5, 0.002"),
    (
      lambda: sampling_plan.ancestral((1.5, 1.5), LEVELS),
      "80, 1.5, 1.5, 0.002",
    ),
    (lambda: sampling_plan.ancestral((80.0,), LEVELS), "80, 80, 0.002"),
    (lambda: sampling_plan.cm_multistep((1.0, 2.5), LEVELS), "80, 1, 2.5"),
    (
      lambda: sampling_plan.inversion(0.07, (15.0, 3.0), LEVELS),
      "0.07, 15, 3, 80",
    ),
    (lambda: sampling_plan.inversion(1.0, (0.5,), LEVELS), "1, 0.5, 80"),
  ],
)
def test_times_out_of_order(make, times):
  with pytest.raises(errors.UserError) as caught:
    make()
  assert times in str(caught.value)


def test_zigzag_that_does_not_amplify():
  for up in (0.05, 0.1):
    with pytest.raises(errors.UserError, match=f"from 0.1 to {up:g}"):
      sampling_plan.zigzag([(0.1, up)], LEVELS)
