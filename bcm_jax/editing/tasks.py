"""Editing tasks: plans and constants.

Constants that no paper specifies were selected on the even half of the digits
test split; docs/editing.md describes their effect and has metrics on the odd
half.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.generate import planning
from bcm_jax.sampling import sampling_plan

# Evaluations by which a two-way map estimates the noise level of an image.
ESTIMATE = 12
# Diffusion classifier: noise levels, and noise samples per level.
CLASS_TIMES, CLASS_DRAWS = (0.4, 0.7, 1.0, 1.5, 2.5), 4
# Inpainting: noise of the last round; ratio of the level to which a round
# inverts to its noise.
LAST_NOISE = 0.3
RISE = 10.0


class Task(NamedTuple):
  """An editing task.

  Attributes:
    description: a few words.
    both_ways: whether the task inverts images and needs a two-way map.
    noise: e, standard deviation of the noise added before inversion, for
      inpainting in the first round; None is `invert.noise`.
    level: noise level at which generation starts; None is sigma_max.
    nfe: number of network evaluations; None is `invert.nfe` for the inversion
      and one for the generation.
    needs_rgb: whether the images must have three channels.
  """

  description: str
  both_ways: bool
  noise: float | None = None
  level: float | None = None
  nfe: int | None = None
  needs_rgb: bool = False


TASKS: Mapping[str, Task] = {
    "interpolate": Task("interpolates between two images", True),
    "inpaint": Task("fills holes by inversion", True, noise=1.0, nfe=14),
    "inpaint_cm": Task("fills holes by projection", False, nfe=16),
    "colorize": Task("colorizes gray images", False, nfe=16, needs_rgb=True),
    "super_resolve": Task("upsamples images", False, nfe=16),
    "denoise": Task("removes white noise", False, nfe=1),
    "restore": Task("removes JPEG artifacts", True, noise=0.1, nfe=3),
    "stroke": Task("generates an image from a sketch", False, level=2.0, nfe=4),
    "relabel": Task("changes the class", True),
    "attribute": Task("adds an attribute", True),
    "purify": Task("removes adversarial perturbations", True, noise=0.2),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Plans of an edit.

  Attributes:
    task: key of TASKS.
    plans: inversion and generation, or one plan, or none.
    extra_nfe: number of network evaluations outside of the plans.
  """

  task: str
  plans: tuple[sampling_plan.Plan, ...]
  extra_nfe: int = 0

  @property
  def nfe(self) -> int:
    """Number of network evaluations per image."""
    return self.extra_nfe + sum(p.nfe for p in self.plans)

  def __str__(self):
    lines = [f"{self.task}: {self.nfe} NFE", *map(str, self.plans)]
    if self.extra_nfe:
      lines.append("estimate of the noise level, then one jump from it")
    return "\n".join(lines)


def recipe(
    experiment: build.Experiment,
    task: str,
    noise: float | None = None,
    level: float | None = None,
    nfe: int | None = None,
    times: Sequence[float] = (),
) -> Recipe:
  """Returns the plans of a task; None and () are the defaults of TASKS.

  Args:
    experiment: experiment of the network.
    task: key of TASKS.
    noise: e, standard deviation of the noise added before inversion.
    level: sigma, noise level of 'stroke' and 'denoise'; None lets 'denoise'
      estimate it.
    nfe: number of network evaluations; for round trips those of the inversion
      plus one.
    times: intermediate levels, as sample.times and invert.times; for 'inpaint'
      the levels t_k to which the rounds invert.

  Raises:
    UserError: an unknown or unsupported task, or settings that the task does
      not take.
  """
  if task not in TASKS:
    raise errors.unknown_name("edit.task", task, TASKS)
  defaults = TASKS[task]
  noise = resolve.argument("edit.noise", noise, "edit.noise")
  level = resolve.argument("edit.sigma", level, "edit.sigma")
  nfe = resolve.argument("edit.nfe", nfe, "edit.nfe")
  times = resolve.argument("edit.times", times, "edit.times")
  _check(experiment, task, defaults, noise, level)
  noise = defaults.noise if noise is None else noise
  level = defaults.level if level is None else level
  if task == "denoise":
    return _denoising(experiment, level, nfe, times)
  if task == "inpaint":
    return _inpainting(experiment, noise, nfe, times)
  if not defaults.both_ways:
    start = experiment.levels.sigma_max if level is None else level
    levels = experiment.levels
    levels.check((start,), "edit.sigma")
    if nfe is None and not times:
      nfe = defaults.nfe
    mid = planning.times_between(
        times, nfe, start, levels.sigma_min, experiment.method.rho, "edit",
    )
    plan = sampling_plan.cm_multistep(mid, levels, start)
    return Recipe(task, (plan,))
  if nfe is None and not times:
    nfe = defaults.nfe
  if nfe is not None and nfe < 2:
    raise errors.UserError(
        f"edit.nfe: got {nfe}, expected at least 2 for edit.task={task!r}, one "
        "of them for the generation"
    )
  inversion = planning.inversion_plan(
      experiment, None if nfe is None else nfe - 1, noise, times
  )
  generation = sampling_plan.ancestral((), experiment.levels)
  return Recipe(task, (inversion, generation))


def _check(experiment, task: str, defaults: Task, noise, level) -> None:
  """Raises UserError for an unsupported task or setting."""
  if defaults.both_ways and not experiment.method.supports_inversion:
    supported = [k for k, v in TASKS.items() if not v.both_ways]
    raise errors.UserError(
        f"edit.task: got {task!r}, expected one of {', '.join(supported)} for "
        f"method {experiment.config.method.name!r}; inversion needs a network "
        f"of {registry.methods_with('supports_inversion')}"
    )
  if defaults.needs_rgb and experiment.image_shape[-1] != 3:
    raise errors.UserError(
        f"edit.task={task!r}: got a network of images "
        f"{experiment.image_shape}, expected 3 channels; choose another task"
    )
  if noise is not None and not defaults.both_ways:
    raise errors.UserError(
        f"edit.noise: got {noise}, expected None for edit.task={task!r}, which "
        "does not invert; omit it"
    )
  if level is not None and task not in ("stroke", "denoise"):
    raise errors.UserError(
        f"edit.sigma: got {level}, expected None for edit.task={task!r}; only "
        "'stroke' and 'denoise' use it"
    )


def _denoising(experiment, level, nfe, times) -> Recipe:
  """Returns one jump, after an estimate of the level if it is None."""
  if nfe not in (None, 1) or times:
    raise errors.UserError(
        f"edit.nfe, edit.times: got {nfe} and {times}, expected one jump for "
        "edit.task='denoise'; omit both"
    )
  levels = experiment.levels
  if level is None:
    estimate = ESTIMATE if experiment.method.supports_inversion else 0
    return Recipe("denoise", (), estimate + 1)
  levels.check((level,), "edit.sigma")
  jump = sampling_plan.Jump(level, levels.sigma_min)
  return Recipe("denoise", (sampling_plan.Plan("denoise", level, (jump,)),))


def _inpainting(experiment, noise: float, nfe: int | None, times) -> Recipe:
  """Returns zigzags of decreasing noise: coarse structure first."""
  if times and nfe not in (2 * len(times), None):
    raise errors.UserError(
        f"edit.nfe: got {nfe}, expected 2 evaluations for each of {len(times)} "
        "edit.times; omit one of the two"
    )
  if nfe is None:
    nfe = 2 * len(times) or TASKS["inpaint"].nfe
  if nfe < 2 or nfe % 2:
    raise errors.UserError(
        f"edit.nfe: got {nfe}, expected an even number, 2 per round of "
        "edit.task='inpaint'"
    )
  levels = experiment.levels
  rounds = nfe // 2
  # geomspace may round the first value; `noise` itself is exact.
  noises = [noise, *np.geomspace(noise, min(noise, LAST_NOISE), rounds)[1:]]
  times = times or [min(RISE * e, levels.sigma_max) for e in noises]
  pairs = [(float(e), t) for e, t in zip(noises, times, strict=True)]
  return Recipe("inpaint", (sampling_plan.zigzags(pairs, levels),))
