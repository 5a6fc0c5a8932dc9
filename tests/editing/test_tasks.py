"""What every editing task does to which network, and what is refused."""

import pytest

from bcm_jax import errors
from bcm_jax.editing import tasks
from bcm_jax.sampling import sampling_plan
from tests import exact


@pytest.fixture(scope="module")
def both_ways():
  return exact.experiment((8, 8, 3))


@pytest.fixture(scope="module")
def one_way():
  return exact.experiment(
      (8, 8, 3), supports_inversion=False, takes_end_time=False
  )


def jumps(recipe):
  return [
      (s.t, s.u) for plan in recipe.plans for s in plan.steps
      if isinstance(s, sampling_plan.Jump)
  ]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_recipe_counts_what_it_does_and_ends_at_images(both_ways, task):
  recipe = tasks.recipe(both_ways, task)
  assert recipe.nfe == len(jumps(recipe)) + recipe.extra_nfe > 0
  assert str(recipe).splitlines()[0].endswith(f"{recipe.nfe} NFE")
  if recipe.plans:
    assert recipe.plans[-1].end == 0.002
  known = tasks.TASKS[task]
  if known.nfe and task != "denoise":
    assert recipe.nfe == known.nfe
  goes_up = any(u > t for t, u in jumps(recipe))
  assert goes_up == known.both_ways


@pytest.mark.parametrize("task", tasks.TASKS)
def test_networks_that_only_make_images_do_what_needs_no_inversion(
    one_way, task
):
  if not tasks.TASKS[task].both_ways:
    recipe = tasks.recipe(one_way, task)
    assert all(u == 0.002 for _, u in jumps(recipe))
    return
  with pytest.raises(errors.UserError, match="inpaint_cm, colorize"):
    tasks.recipe(one_way, task)


def test_inpainting_inverts_lower_and_lower_with_less_and_less_noise(
    both_ways
):
  (plan,) = tasks.recipe(both_ways, "inpaint").plans
  added = [s.scale for s in plan.steps if isinstance(s, sampling_plan.AddNoise)]
  assert added[0] == 1.0 and added[-1] == pytest.approx(0.3)
  assert added == sorted(added, reverse=True)
  tops = [u for t, u in jumps(tasks.recipe(both_ways, "inpaint")) if u > t]
  assert tops == pytest.approx([10 * e for e in added])
  (plan,) = tasks.recipe(
      both_ways, "inpaint", noise=0.1, times=(30.0, 3.0)
  ).plans
  assert [s.scale for s in plan.steps[::3]] == [0.1, 0.1]
  assert [s.u for s in plan.steps[1::3]] == [30.0, 3.0]
  (plan,) = tasks.recipe(both_ways, "inpaint", noise=8.0, nfe=2).plans
  assert [str(s).split("(")[0].strip() for s in plan.steps] == [
      "noise  + 8 z", "jump   8 -> 40", "jump   40 -> 0.002"
  ]


def test_settings_reach_the_plans(both_ways):
  there, back = tasks.recipe(
      both_ways, "restore", noise=0.4, nfe=3
  ).plans
  assert there.steps[0].scale == 0.4 and there.nfe == 2 and back.nfe == 1
  there, _ = tasks.recipe(both_ways, "relabel", times=(0.5, 9.0)).plans
  assert [s.u for s in there.steps[1:]] == [0.5, 9.0, 40.0]
  (plan,) = tasks.recipe(both_ways, "stroke", level=3.0, nfe=1).plans
  assert plan.start == 3.0 and plan.nfe == 1
  (plan,) = tasks.recipe(both_ways, "stroke", times=(0.5,)).plans
  assert [s.t for s in plan.steps[::2]] == [2.0, 0.5]
  (plan,) = tasks.recipe(both_ways, "denoise", level=0.7).plans
  assert plan.start == 0.7
  assert tasks.recipe(both_ways, "denoise").nfe == 13


def test_an_unknown_level_costs_no_evaluations_without_inversion(one_way):
  assert tasks.recipe(one_way, "denoise").nfe == 1


@pytest.mark.parametrize("task, settings, said", [
    ("impaint", {}, "'inpaint'"),
    ("colorize", dict(noise=0.1), "edit.noise"),
    ("restore", dict(level=1.0), "edit.sigma"),
    ("stroke", dict(level=90.0), "edit.sigma"),
    ("stroke", dict(nfe=0), "edit.nfe"),
    ("inpaint", dict(nfe=0), "edit.nfe"),
    ("restore", dict(nfe=0), "edit.nfe"),
    ("relabel", dict(nfe=1), "edit.nfe"),
    ("denoise", dict(level=90.0), "edit.sigma"),
    ("denoise", dict(nfe=2), "edit.nfe"),
    ("inpaint", dict(nfe=3), "edit.nfe"),
    ("inpaint", dict(nfe=8, times=(3.0, 2.0)), "edit.times"),
    ("colorize", dict(nfe=8, times=(3.0, 2.0)), "times"),
    ("inpaint", dict(noise=50.0), "50"),
    ("restore", dict(noise=0.0), "noise"),
])
def test_what_does_not_fit_is_refused(both_ways, task, settings, said):
  with pytest.raises(errors.UserError, match=said):
    tasks.recipe(both_ways, task, **settings)


def test_grey_images_get_no_colours():
  with pytest.raises(errors.UserError, match="colorize"):
    tasks.recipe(exact.experiment(), "colorize")
