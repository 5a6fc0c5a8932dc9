"""Sampling and inversion plans of a config, and the notation of samplers.

Notation: 'ancestral' uses the times of config section `sample`. 'ancestral:4'
uses four network evaluations (NFE), at those times if their number matches,
else at default times. 'mixture@3/0.12>0.4' sets the times in units of sigma:
intermediate times, and pairs 'e>t' of a zigzag.
"""

from collections.abc import Sequence
import math
import typing
from typing import NamedTuple

import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.config import schema
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.sampling import sampling_plan

SAMPLERS = typing.get_args(schema.Sampler)
_TAKES_TIMES = ("ancestral", "mixture", "cm_multistep", "gamma")
# ODE solvers; they use sample.num_levels instead of times.
_SOLVERS = ("ddim", "heun")
_TAKES_PAIRS = ("zigzag", "mixture")
# Samplers whose jumps end at intermediate times. Their default times are above
# this multiple of sigma_data, since networks are least accurate in jumps to
# lower levels: on digits four and eight steps through lower ones are worse than
# two (benchmarks/methods_digits.py).
_JUMPS_TO_TIMES = ("ancestral", "mixture", "gamma")
_LOWEST_TIME = 0.4
# Published zigzag of the three-step sampler on ImageNet-64 (Li & He, 2024).
_ZIGZAG = ((0.1, 1.2),)

Pairs = tuple[tuple[float, float], ...]


class Request(NamedTuple):
  """A parsed sampler.

  Attributes:
    name: one of SAMPLERS.
    nfe: number of network evaluations, None without ':'.
    times: intermediate times; None without '@'.
    pairs: (e, t) of the zigzags; None without '@'.
  """

  name: str
  nfe: int | None = None
  times: tuple[float, ...] | None = None
  pairs: Pairs | None = None


def parse(text: str) -> Request:
  """Parses the notation of the module docstring.

  Raises:
    UserError: unknown sampler or unparsable times.
  """
  if not isinstance(text, str):
    raise errors.UserError(
        f"sampler: got {text!r}, expected a name such as 'ancestral:4'"
    )
  head, at, tail = text.partition("@")
  name, colon, count = head.partition(":")
  if name not in SAMPLERS:
    raise errors.unknown_name("sampler", name, SAMPLERS)
  try:
    nfe = int(count) if colon else None
    times, pairs = _parse_times(tail) if at else (None, None)
  except ValueError as e:
    raise errors.UserError(
        f"sampler: got {text!r} ({e}), expected NAME, NAME:NFE or NAME@TIMES; "
        f"write for example {name}:4 or {name}@3/0.12>0.4"
    ) from e
  if (times and name not in _TAKES_TIMES) or (
      pairs and name not in _TAKES_PAIRS
  ):
    raise errors.UserError(
        f"sampler: got {text!r}, expected {name} without "
        f"{'intermediate times' if name not in _TAKES_TIMES else 'pairs e>t'}; "
        "omit them or choose 'mixture'"
    )
  return Request(
      name, resolve.argument("sampler", nfe, "sample.nfe"), times, pairs
  )


def _parse_times(text: str) -> tuple[tuple[float, ...], Pairs]:
  parts = [p for p in text.split("/") if p]
  pairs = [tuple(float(v) for v in p.split(">")) for p in parts if ">" in p]
  if any(len(p) != 2 for p in pairs):
    raise ValueError("a zigzag is written e>t")
  return tuple(float(p) for p in parts if ">" not in p), tuple(pairs)


def write(name: str, times: Sequence[float], pairs: Pairs = ()) -> str:
  """Returns the notation of a sampler with times; the inverse of `parse`."""
  parts = [f"{t:g}" for t in times] + [f"{e:g}>{t:g}" for e, t in pairs]
  return f"{name}@{'/'.join(parts)}" if parts else name


def _mid_times(
    start: float, end: float, count: int, rho: float
) -> tuple[float, ...]:
  """Returns the interior points of a Karras grid (EDM, eq. 5)."""
  low, high = min(start, end), max(start, end)
  inner = schedules.karras_sigmas(count + 2, low, high, rho)[1:-1]
  return tuple(float(t) for t in (inner if start < end else inner[::-1]))


def times_between(
    times: Sequence[float], nfe: int | None, start, end, rho, section: str
) -> tuple[float, ...]:
  """Returns intermediate times of a sampler.

  Args:
    times: configured times; empty selects a Karras grid.
    nfe: number of network evaluations, or None.
    start: first noise level.
    end: last noise level.
    rho: rho of the Karras grid.
    section: config section, for errors.

  Raises:
    UserError: nfe is not positive or does not match times.
  """
  if times:
    if nfe is not None and nfe != len(times) + 1:
      raise errors.UserError(
          f"{section}.times: got {len(times)} with {section}.nfe={nfe}, "
          f"expected {nfe - 1} intermediate times; omit one of the two keys"
      )
    return tuple(times)
  if nfe is not None and nfe < 1:
    raise errors.UserError(
        f"{section}.nfe: got {nfe}, expected at least 1; increase it"
    )
  return _mid_times(start, end, (nfe or 1) - 1, rho)


def _pairs(sample: schema.Sample) -> Pairs:
  noise, level = sample.zigzag_noise, sample.zigzag_level
  if len(noise) != len(level):
    raise errors.UserError(
        f"sample.zigzag_noise: got {len(noise)} values, expected {len(level)} "
        "as in sample.zigzag_level; set as many of each"
    )
  return tuple(zip(noise, level, strict=True)) or _ZIGZAG


def requested_labels(
    experiment: build.Experiment, sample: schema.Sample
) -> np.ndarray | None:
  """Returns the labels of the images to generate.

  Args:
    experiment: number of classes.
    sample: config section; without `label` the classes alternate.

  Returns:
    [num_samples] int32, or None for an unconditional network.

  Raises:
    UserError: sample.label is not a class of the network.
  """
  classes = experiment.num_classes
  if classes is None:
    if sample.label is not None:
      raise errors.UserError(
          f"sample.label: got {sample.label}, expected None for an "
          "unconditional network; omit it"
      )
    return None
  if sample.label is None:
    return (np.arange(sample.num_samples) % classes).astype(np.int32)
  if not 0 <= sample.label < classes:
    raise errors.UserError(
        f"sample.label: got {sample.label}, expected a class in 0 .. "
        f"{classes - 1}; choose one"
    )
  return np.full(sample.num_samples, sample.label, np.int32)


def plan_of(
    experiment: build.Experiment, sampler: str | None = None
) -> sampling_plan.Plan:
  """Returns the plan of a sampler.

  Args:
    experiment: noise levels and config section `sample`.
    sampler: in the notation of the module; None is `sample.sampler`.

  Raises:
    UserError: unknown sampler, times that do not match, or a sampler that the
      network does not support.
  """
  sample = experiment.sample
  request = parse(sampler or sample.sampler)
  name, nfe, times = request.name, request.nfe, sample.times
  if sampler is None or (nfe is None and name == sample.sampler):
    nfe = sample.nfe
  if name in _SOLVERS:
    return _guided(experiment, _solver_plan(experiment, name, nfe))
  pairs = request.pairs
  if request.times is not None:  # '@' overrides section sample.
    nfe, times = None, request.times
  elif pairs is None and name in _TAKES_PAIRS:
    pairs = _pairs(sample)
  pairs = pairs or ()
  mid: tuple[float, ...] = ()
  if name in _TAKES_TIMES and not (request.times == ()):
    inner = None if nfe is None else nfe - 2 * len(pairs)
    if request.nfe is not None and inner != len(times) + 1:
      times = ()
    if inner is None and not times:
      inner = 2
    levels, method = experiment.levels, experiment.method
    end = levels.sigma_min
    if name in _JUMPS_TO_TIMES and not method.is_denoiser:
      end = max(end, _LOWEST_TIME * method.sigma_data)
    mid = times_between(
        times, inner, levels.sigma_max, end, method.rho, "sample"
    )
  plan = _plan(name, mid, pairs, sample.gamma, experiment.levels)
  if nfe is not None and plan.nfe != nfe:
    raise errors.UserError(
        f"sample.nfe: got {nfe}, expected {plan.nfe} for {name} with these "
        "times; omit sample.nfe or change the times"
    )
  _check_end_levels(experiment, plan)
  return _guided(experiment, plan)


def _plan(
    name: str, mid, pairs: Pairs, gamma: float, levels: sampling_plan.NoiseRange
) -> sampling_plan.Plan:
  return {
      "onestep": lambda: sampling_plan.ancestral((), levels),
      "ancestral": lambda: sampling_plan.ancestral(mid, levels),
      "zigzag": lambda: sampling_plan.zigzag(pairs, levels),
      "mixture": lambda: sampling_plan.mixture(mid, pairs, levels),
      "cm_multistep": lambda: sampling_plan.cm_multistep(mid, levels),
      "gamma": lambda: sampling_plan.gamma_sampling(mid, gamma, levels),
  }[name]()


def _solver_plan(
    experiment: build.Experiment, name: str, nfe: int | None
) -> sampling_plan.Plan:
  """Returns the plan of an ODE solver; None for nfe uses sample.num_levels."""
  sample = experiment.sample
  if not experiment.method.is_denoiser:
    raise errors.UserError(
        f"sampler: got {name!r}, which solves the ODE of a denoiser, expected "
        "a sampler for a network that predicts jumps; use 'onestep', "
        "'ancestral' or 'cm_multistep'"
    )
  count = sample.num_levels
  if nfe is not None:
    count = nfe if name == "ddim" else (nfe + 1) // 2
    if name == "heun" and nfe % 2 == 0:
      raise errors.UserError(
          f"sampler: got 'heun' with {nfe} evaluations, expected an odd number "
          f"2 N - 1; use {nfe - 1} or {nfe + 1}"
      )
  if count < 2:
    raise errors.UserError(
        f"sample.num_levels: got {count}, expected at least 2 for {name!r}; "
        "increase it or the NFE"
    )
  high = math.inf if sample.s_tmax is None else sample.s_tmax
  churn = solvers.Churn(sample.s_churn, sample.s_tmin, high, sample.s_noise)
  levels = experiment.levels
  grid = schedules.karras_sigmas(
      count, levels.sigma_min, levels.sigma_max, experiment.method.rho
  )
  sigmas = [float(s) for s in grid[::-1]]
  sigmas[0], sigmas[-1] = levels.sigma_max, levels.sigma_min
  return sampling_plan.ode(sigmas, churn, name == "heun", levels)


def _guided(
    experiment: build.Experiment, plan: sampling_plan.Plan
) -> sampling_plan.Plan:
  """Returns the plan with the guidance of config section `sample`."""
  sample = experiment.sample
  if sample.guidance == 1.0:
    return plan
  if not experiment.method.is_denoiser:
    raise errors.UserError(
        f"sample.guidance: got {sample.guidance}, expected 1 for a network "
        "that predicts jumps, since guidance needs a denoiser; set "
        "sample.guidance=1"
    )
  interval = sample.guidance_interval
  if interval and not (len(interval) == 2 and interval[0] < interval[1]):
    raise errors.UserError(
        f"sample.guidance_interval: got {interval}, expected (low, high) with "
        "low < high; set it, or () to guide at all noise levels"
    )
  return sampling_plan.guide(plan, *interval)


def inversion_plan(
    experiment: build.Experiment,
    nfe: int | None = None,
    noise: float | None = None,
    times: tuple[float, ...] = (),
) -> sampling_plan.Plan:
  """Returns the plan of an inversion (Li & He, 2024).

  Args:
    experiment: noise levels and config section `invert`.
    nfe: number of network evaluations; None is `invert.nfe`.
    noise: standard deviation of the initial noise; None is `invert.noise`.
    times: intermediate times; empty is `invert.times` if their number matches
      nfe, else default times.

  Raises:
    UserError: times that do not match or are out of range, or a network without
      inversion.
  """
  section = experiment.invert
  nfe = resolve.argument("invert.nfe", nfe, "invert.nfe")
  if noise is None:
    noise = section.noise
  e = resolve.argument("invert.noise", noise, "invert.noise")
  if not times:
    times = section.times
    if nfe is None:
      nfe = section.nfe
    elif nfe != len(times) + 1:
      times = ()
  levels = experiment.levels
  mid = times_between(
      times, nfe, e, levels.sigma_max, experiment.method.rho, "invert"
  )
  plan = sampling_plan.inversion(e, mid, levels)
  _check_end_levels(experiment, plan)
  method = experiment.method
  if not (method.supports_inversion or method.is_denoiser):
    raise errors.UserError(
        "method.name: got a network that maps only from noise to images, "
        "expected one that supports inversion and editing; train with "
        f"{registry.methods_with('supports_inversion')}, or a denoiser"
    )
  return plan


def _check_end_levels(experiment: build.Experiment, plan) -> None:
  low = experiment.levels.sigma_min
  if experiment.method.takes_end_time:
    return
  if any(isinstance(s, sampling_plan.Jump) and s.u != low for s in plan.steps):
    raise errors.UserError(
        f"model.two_time: got False for sampler {plan.name}, expected True, "
        "since it jumps to levels other than sigma_min; use sampler 'onestep' "
        "or 'cm_multistep', or fine-tune with "
        f"{registry.methods_with('supports_inversion')}"
    )
