"""What a config asks of samplers and inversions, and how it is written."""

import pytest

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.generate import planning
from bcm_jax.sampling import sampling_plan


def digits(**overrides: str):
  return resolve.resolve(
      resolve.read_file("configs/digits.py"),
      {k.replace("__", "."): v for k, v in overrides.items()},
  )


def plan_of(**overrides: str) -> sampling_plan.Plan:
  return planning.plan_of(build.build(digits(**overrides)))


def test_plans_of_a_config():
  assert plan_of(sample__sampler="onestep").nfe == 1
  two = plan_of(sample__sampler="ancestral", sample__times="2")
  assert [s.u for s in two.steps] == [2.0, 0.002]
  default = plan_of(
      sample__sampler="ancestral", sample__nfe="3", sample__times="()"
  )
  assert default.nfe == 3
  zigzag = plan_of(
      sample__sampler="zigzag", sample__zigzag_noise="0.1,0.2",
      sample__zigzag_level="1,0.8", sample__nfe="5",
  )
  assert zigzag.nfe == 5
  both = plan_of(
      sample__sampler="mixture", sample__times="3",
      sample__zigzag_noise="0.12", sample__zigzag_level="0.4",
  )
  assert both.nfe == 4


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"sample.sampler": "ancestral", "sample.nfe": "4",
          "sample.times": "2"}, "3 "),
        ({"sample.sampler": "onestep", "sample.nfe": "2"}, "onestep"),
        ({"sample.sampler": "zigzag", "sample.zigzag_noise": "1,2",
          "sample.zigzag_level": "3"}, "zigzag"),
        ({"sample.sampler": "zigzag", "sample.zigzag_noise": "2",
          "sample.zigzag_level": "1"}, "zigzag|level"),
        ({"sample.sampler": "ancestral", "sample.times": "1,3"},
         "decreasing"),
        ({"sample.sampler": "ancestral", "sample.times": "100"}, "100"),
        ({"sample.sampler": "ancestal"}, "'ancestral'"),
    ],
)
def test_bad_plans(overrides, said):
  with pytest.raises(errors.UserError, match=said):
    plan_of(**overrides)


def test_one_time_network_refuses_other_end_levels():
  def plan(sampler):
    config = resolve.resolve(
        resolve.read_file("configs/digits_ict.py"),
        {"sample.sampler": sampler, "sample.times": "2"},
    )
    return planning.plan_of(build.build(config))

  with pytest.raises(errors.UserError, match="cm_multistep"):
    plan("ancestral")
  assert plan("cm_multistep").nfe == 2


@pytest.fixture(scope="module")
def experiment():
  """Digits, with one time and one zigzag of its own."""
  return build.build(digits(
      sample__times="1.5", sample__zigzag_noise="0.2",
      sample__zigzag_level="0.9",
  ))


def times(plan):
  return [s.u for s in plan.steps if isinstance(s, sampling_plan.Jump)]


def test_samplers_by_name_number_and_times(experiment):
  def plan(text):
    return planning.plan_of(experiment, text)

  assert times(plan("ancestral")) == [1.5, 0.002]
  assert times(plan("ancestral:2")) == [1.5, 0.002]
  assert plan("ancestral:5").nfe == 5
  assert 1.5 not in times(plan("ancestral:5"))
  assert times(plan("ancestral@3/0.5")) == [3, 0.5, 0.002]
  assert times(plan("zigzag")) == [0.002, 0.9, 0.002]
  assert times(plan("zigzag@0.1>0.3/0.05>0.2")) == [
      0.002, 0.3, 0.002, 0.2, 0.002
  ]
  assert times(plan("mixture@3/0.12>0.4")) == [3, 0.002, 0.4, 0.002]
  assert times(plan("mixture:4")) == [1.5, 0.002, 0.9, 0.002]
  assert times(plan("cm_multistep@2")) == [0.002, 0.002]
  assert plan("onestep").nfe == 1


@pytest.mark.parametrize("text", [
    "onestep", "ancestral@2.4", "zigzag@0.1>1.2", "mixture@3/0.12>0.4",
    "cm_multistep@5/2/1",
])
def test_notation_is_written_as_it_is_read(text):
  request = planning.parse(text)
  assert planning.write(
      request.name, request.times or (), request.pairs or ()
  ) == text


@pytest.mark.parametrize("text, said", [
    ("ancestal:2", "'ancestral'"),
    ("ancestral:two", "two"),
    ("ancestral@x", "ancestral@x"),
    ("zigzag@0.1>0.2>0.3", "e>t"),
    ("zigzag@3", "zigzag"),
    ("ancestral@0.1>2", "ancestral"),
    ("ancestral@300", "300"),
    ("onestep:2", "onestep"),
])
def test_bad_notation_says_what_is_wrong(experiment, text, said):
  with pytest.raises(errors.UserError, match=said):
    planning.plan_of(experiment, text)


def test_inversions_by_number_and_noise(experiment):
  plan = planning.inversion_plan(experiment, 3, 0.2)
  assert plan.steps[0] == sampling_plan.AddNoise(0.2, 0.2)
  assert plan.nfe == 3
  assert planning.inversion_plan(experiment).steps[0].scale == 0.07


@pytest.mark.parametrize("file, name", [
    ("digits.py", "ancestral"), ("digits_ctm.py", "ancestral"),
    ("digits_ctm.py", "gamma"), ("digits.py", "mixture"),
])
@pytest.mark.parametrize("nfe", [2, 4, 8, 16])
def test_default_times_are_levels_that_a_jump_can_hit(file, name, nfe):
  """Not below 0.4 sigma_data, 0.3 on digits."""
  config = resolve.resolve(resolve.read_file(file), {"sample.times": "()"})
  built = build.build(config, to_train=False)
  nfe += 2 * (name == "mixture")  # Its zigzag ends at a level of its own.
  plan = planning.plan_of(built, f"{name}:{nfe}")
  assert plan.nfe == nfe
  steps = plan.steps[: -3 if name == "mixture" else None]
  levels = [s.t for s in steps if isinstance(s, sampling_plan.Jump)]
  assert min(levels) > 0.3


def test_default_times_of_exact_levels_reach_sigma_min():
  """Noise is added to reach them, or the network is a denoiser."""
  for file, name in (("digits_ict.py", "cm_multistep"),
                     ("digits_edm.py", "ancestral")):
    config = resolve.resolve(resolve.read_file(file), {"sample.times": "()"})
    built = build.build(config, to_train=False)
    levels = [
        s.t for s in planning.plan_of(built, f"{name}:8").steps
        if isinstance(s, sampling_plan.Jump)
    ]
    assert min(levels) < 0.1
