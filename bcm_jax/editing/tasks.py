"""What every editing task does: its plans and its constants.

Constants of ours, not of a paper, were chosen on the even half of the digits'
test split; docs/editing.md tells what each of them changes, and has the numbers
of the odd half.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.generate import planning
from bcm_jax.sampling import sampling_plan

# Evaluations by which a two-way network measures the noise in an image.
ESTIMATE = 12
# Noise that is added to find the class of an image, and how often.
CLASS_TIMES, CLASS_DRAWS = (0.4, 0.7, 1.0, 1.5, 2.5), 4
# Inpainting: noise of the last round, and to how many times the noise of a
# round it inverts.
LAST_NOISE = 0.3
RISE = 10.0


class Task(NamedTuple):
  """A task of mode edit.

  Attributes:
    what: in a few words.
    both_ways: whether it inverts, which a network must have learnt.
    noise: e, standard deviation of the noise added before inverting, of
      inpainting that of the first round; None is section invert's.
    level: where generation starts; None is sigma_max.
    nfe: network evaluations; None is section invert's, and one back.
    colours: whether the images must have three channels.
  """

  what: str
  both_ways: bool
  noise: float | None = None
  level: float | None = None
  nfe: int | None = None
  colours: bool = False


TASKS: Mapping[str, Task] = {
    "interpolate": Task("goes from one image to another", True),
    "inpaint": Task("fills holes, by inverting", True, noise=1.0, nfe=14),
    "inpaint_cm": Task("fills holes, putting known pixels back", False, nfe=16),
    "colorize": Task("gives grey images colours", False, nfe=16, colours=True),
    "super_resolve": Task("gives small images details", False, nfe=16),
    "denoise": Task("takes white noise out", False, nfe=1),
    "restore": Task("takes JPEG's artefacts out", True, noise=0.1, nfe=3),
    "stroke": Task("makes a sketch an image", False, level=2.0, nfe=4),
    "relabel": Task("makes an image one of another class", True),
    "attribute": Task("brings a property of some images", True),
    "purify": Task("takes a perturbation out", True, noise=0.2),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What an edit will do.

  Attributes:
    task: one of TASKS.
    plans: one after another; an inversion and the way back, or one plan.
    more: evaluations that no plan counts.
  """

  task: str
  plans: tuple[sampling_plan.Plan, ...]
  more: int = 0

  @property
  def nfe(self) -> int:
    """Network evaluations an image."""
    return self.more + sum(p.nfe for p in self.plans)

  def __str__(self):
    lines = [f"{self.task}: {self.nfe} NFE", *map(str, self.plans)]
    if self.more:
      lines.append("the level of the noise, and a jump from there")
    return "\n".join(lines)


def recipe(
    experiment: build.Experiment,
    task: str,
    noise: float | None = None,
    level: float | None = None,
    nfe: int | None = None,
    times: Sequence[float] = (),
) -> Recipe:
  """The recipe of a task for a network; None and () take the defaults.

  Args:
    experiment: of the network.
    task: one of TASKS.
    noise: e, before inverting.
    level: 'stroke', 'denoise': of the noise, sigma. 'denoise' estimates it
      where there is none.
    nfe: evaluations; of round trips those of the inversion and one back.
    times: levels between, as sample.times and invert.times; of 'inpaint' the
      levels t_k to which its rounds invert.

  Raises:
    UserError: an unknown task, one that the network cannot do, or settings
      that do not fit it.
  """
  if task not in TASKS:
    raise errors.unknown_name("edit.task", task, TASKS)
  known = TASKS[task]
  _check(experiment, task, known, noise, level)
  times = tuple(float(t) for t in times)
  noise = known.noise if noise is None else noise
  level = known.level if level is None else level
  if task == "denoise":
    return _denoising(experiment, level, nfe, times)
  if task == "inpaint":
    return _inpainting(
        experiment, noise, nfe, times
    )
  if not known.both_ways:
    start = experiment.levels.sigma_max if level is None else level
    levels = experiment.levels
    levels.check((start,), "edit.sigma")
    mid = planning.times_between(
        times, known.nfe if nfe is None and not times else nfe, start,
        levels.sigma_min, experiment.method.rho, "edit",
    )
    plan = sampling_plan.cm_multistep(mid, levels, start)
    return Recipe(task, (plan,))
  if nfe is None and not times:
    nfe = known.nfe
  if nfe is not None and nfe < 2:
    raise errors.UserError(
        f"edit.nfe={nfe}: {task!r} inverts and comes back; give 2 or more"
    )
  there = planning.inversion_plan(
      experiment, None if nfe is None else nfe - 1, noise, times
  )
  return Recipe(task, (there, sampling_plan.ancestral((), experiment.levels)))


def _check(experiment, task: str, known: Task, noise, level) -> None:
  if known.both_ways and not experiment.method.supports_inversion:
    others = [k for k, v in TASKS.items() if not v.both_ways]
    raise errors.UserError(
        f"edit.task={task!r} inverts images, which takes a network of "
        f"{registry.methods_with('supports_inversion')}; this one "
        f"({experiment.config.method.name!r}) can do {', '.join(others)}"
    )
  if known.colours and experiment.image_shape[-1] != 3:
    raise errors.UserError(
        f"edit.task={task!r} needs images of three channels; this network "
        f"makes images of {experiment.image_shape}"
    )
  if noise is not None and not known.both_ways:
    raise errors.UserError(
        f"edit.noise={noise} is added before an inversion, and "
        f"edit.task={task!r} has none; leave it out"
    )
  if level is not None and task not in ("stroke", "denoise"):
    raise errors.UserError(
        f"edit.sigma={level} is where 'stroke' and 'denoise' start; leave it "
        f"out of edit.task={task!r}"
    )


def _denoising(experiment, level, nfe, times) -> Recipe:
  if nfe not in (None, 1) or times:
    raise errors.UserError(
        "edit.task='denoise' is one jump; leave edit.nfe and edit.times out"
    )
  levels = experiment.levels
  if level is None:
    estimate = ESTIMATE if experiment.method.supports_inversion else 0
    return Recipe("denoise", (), estimate + 1)
  levels.check((level,), "edit.sigma")
  jump = sampling_plan.Jump(level, levels.sigma_min)
  return Recipe("denoise", (sampling_plan.Plan("denoise", level, (jump,)),))


def _inpainting(experiment, noise: float, nfe: int | None, times) -> Recipe:
  """Zigzags of less and less noise: what is large is settled first."""
  if times and nfe not in (2 * len(times), None):
    raise errors.UserError(
        f"edit.nfe={nfe} needs {nfe // 2} levels in edit.times, which has "
        f"{len(times)}; leave one of the two out"
    )
  if nfe is None:
    nfe = 2 * len(times) or TASKS["inpaint"].nfe
  if noise <= 0:
    raise errors.UserError(
        f"edit.noise={noise} fills the hole of 'inpaint'; give more than 0"
    )
  if nfe < 2 or nfe % 2:
    raise errors.UserError(
        f"edit.nfe={nfe}: 'inpaint' makes two evaluations a round; give an "
        "even number"
    )
  levels = experiment.levels
  rounds = nfe // 2
  # The first and last noises are as given, to the bit.
  noises = [noise, *np.geomspace(noise, min(noise, LAST_NOISE), rounds)[1:]]
  times = times or [min(RISE * e, levels.sigma_max) for e in noises]
  pairs = [(float(e), t) for e, t in zip(noises, times, strict=True)]
  return Recipe("inpaint", (sampling_plan.zigzags(pairs, levels),))
