"""Plans of a config's sampler and inversion, and the notation of samplers.

A sampler is written 'ancestral' (with the times of config section `sample`),
'ancestral:4' (four evaluations, at those times if they match, else at default
times) or 'mixture@3/0.12>0.4' (times in sigma: intermediate ones, and pairs
'e>t' of a zigzag).
"""

from collections.abc import Sequence
import math
import typing
from typing import NamedTuple

import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import schema
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.sampling import sampling_plan

SAMPLERS = typing.get_args(schema.Sampler)
_TAKES_TIMES = ("ancestral", "mixture", "cm_multistep", "gamma")
# ODE solvers, each on its own grid.
_SOLVERS = ("ddim", "heun")
_TAKES_PAIRS = ("zigzag", "mixture")
# Published zigzag of the three-step sampler on ImageNet-64 (Li & He, 2024).
_ZIGZAG = ((0.1, 1.2),)

Pairs = tuple[tuple[float, float], ...]


class Request(NamedTuple):
  """A parsed sampler.

  Attributes:
    name: one of SAMPLERS.
    nfe: number of evaluations, or None.
    times: intermediate times; None without '@'.
    pairs: zigzag's (e, t); None without '@'.
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
  head, at, tail = text.partition("@")
  name, colon, count = head.partition(":")
  if name not in SAMPLERS:
    raise errors.unknown_name("sampler", name, SAMPLERS)
  try:
    nfe = int(count) if colon else None
    times, pairs = _parse_times(tail) if at else (None, None)
  except ValueError as e:
    raise errors.UserError(
        f"sampler {text!r} is not understood ({e}); write {name}, {name}:4 "
        f"for four evaluations, or {name}@3/0.12>0.4 for these times"
    ) from e
  if (times and name not in _TAKES_TIMES) or (
      pairs and name not in _TAKES_PAIRS
  ):
    raise errors.UserError(
        f"sampler {text!r}: {name} takes no "
        f"{'intermediate times' if name not in _TAKES_TIMES else 'pairs e>t'}; "
        "omit them or choose 'mixture'"
    )
  return Request(name, nfe, times, pairs)


def _parse_times(text: str) -> tuple[tuple[float, ...], Pairs]:
  parts = [p for p in text.split("/") if p]
  pairs = [tuple(float(v) for v in p.split(">")) for p in parts if ">" in p]
  if any(len(p) != 2 for p in pairs):
    raise ValueError("a zigzag is e>t")
  return tuple(float(p) for p in parts if ">" not in p), tuple(pairs)


def write(name: str, times: Sequence[float], pairs: Pairs = ()) -> str:
  """Returns the notation of a sampler with times."""
  parts = [f"{t:g}" for t in times] + [f"{e:g}>{t:g}" for e, t in pairs]
  return f"{name}@{'/'.join(parts)}" if parts else name


def _mid_times(
    start: float, end: float, count: int, rho: float
) -> tuple[float, ...]:
  """Returns interior points of a Karras grid from start to end."""
  low, high = min(start, end), max(start, end)
  inner = schedules.karras_sigmas(count + 2, low, high, rho)[1:-1]
  return tuple(float(t) for t in (inner if start < end else inner[::-1]))


def times_between(
    given: Sequence[float], nfe: int | None, start, end, rho, section: str
) -> tuple[float, ...]:
  """Returns the given intermediate times, or default ones for an NFE."""
  if given:
    if nfe is not None and nfe != len(given) + 1:
      raise errors.UserError(
          f"{section}.nfe={nfe} needs {nfe - 1} intermediate times, but "
          f"{section}.times has {len(given)}; omit one of the two"
      )
    return tuple(given)
  if nfe is not None and nfe < 1:
    raise errors.UserError(f"{section}.nfe={nfe} must be at least 1")
  return _mid_times(start, end, (nfe or 1) - 1, rho)


def _pairs(sample: schema.Sample) -> Pairs:
  noise, level = sample.zigzag_noise, sample.zigzag_level
  if len(noise) != len(level):
    raise errors.UserError(
        f"sample.zigzag_noise has {len(noise)} values and zigzag_level "
        f"{len(level)}; give as many of each"
    )
  return tuple(zip(noise, level, strict=True)) or _ZIGZAG


def asked_labels(
    experiment: build.Experiment, sample: schema.Sample
) -> np.ndarray | None:
  """Returns classes of the images to generate: one, or all equally often."""
  classes = experiment.num_classes
  if classes is None:
    if sample.label is not None:
      raise errors.UserError(
          f"sample.label={sample.label}, but the network is unconditional; "
          "omit it"
      )
    return None
  if sample.label is None:
    return (np.arange(sample.num_samples) % classes).astype(np.int32)
  if not 0 <= sample.label < classes:
    raise errors.UserError(
        f"sample.label={sample.label} is out of range; this network has "
        f"classes 0 to {classes - 1}"
    )
  return np.full(sample.num_samples, sample.label, np.int32)


def plan_of(
    experiment: build.Experiment, sampler: str | None = None
) -> sampling_plan.Plan:
  """Returns the plan of `sample.sampler` or of another sampler.

  Args:
    experiment: gives noise levels and config section `sample`.
    sampler: in the notation of the module; None is `sample.sampler`.

  Raises:
    UserError: unknown sampler, times that do not match, or a sampler that
      needs end levels of a network without them.
  """
  sample = experiment.sample
  request = parse(sampler or sample.sampler)
  name, nfe, given = request.name, request.nfe, sample.times
  if sampler is None or (nfe is None and name == sample.sampler):
    nfe = sample.nfe
  if name in _SOLVERS:
    return _guided(experiment, _solver_plan(experiment, name, nfe))
  pairs = request.pairs
  if request.times is not None:  # '@': only the written times.
    nfe, given = None, request.times
  elif pairs is None and name in _TAKES_PAIRS:
    pairs = _pairs(sample)
  pairs = pairs or ()
  mid: tuple[float, ...] = ()
  if name in _TAKES_TIMES and not (request.times == ()):
    inner = None if nfe is None else nfe - 2 * len(pairs)
    if request.nfe is not None and inner != len(given) + 1:
      given = ()
    if inner is None and not given:
      inner = 2
    levels = experiment.levels
    mid = times_between(
        given, inner, levels.sigma_max, levels.sigma_min,
        experiment.method.rho, "sample",
    )
  plan = _plan(name, mid, pairs, sample.gamma, experiment.levels)
  if nfe is not None and plan.nfe != nfe:
    raise errors.UserError(
        f"sample.nfe={nfe}, but {name} with these times makes {plan.nfe} "
        "evaluations; omit sample.nfe or change the times"
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
  """Returns the plan of an ODE solver; nfe None is sample.num_levels."""
  sample = experiment.sample
  if not experiment.method.is_denoiser:
    raise errors.UserError(
        f"sampler {name!r} solves the ODE of a denoiser, and this network "
        "predicts jumps; use 'onestep', 'ancestral' or 'cm_multistep'"
    )
  count = sample.num_levels
  if nfe is not None:
    count = nfe if name == "ddim" else (nfe + 1) // 2
    if name == "heun" and nfe % 2 == 0:
      raise errors.UserError(
          f"sampler 'heun' makes 2 N - 1 evaluations, never {nfe}; ask for "
          f"{nfe - 1} or {nfe + 1}"
      )
  if count < 2:
    raise errors.UserError(
        f"sampler {name!r} needs a grid of 2 levels or more, not {count}"
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
        f"sample.guidance={sample.guidance} guides denoisers, and this network "
        "predicts jumps; set sample.guidance=1"
    )
  interval = sample.guidance_interval
  if interval and not (len(interval) == 2 and interval[0] < interval[1]):
    raise errors.UserError(
        f"sample.guidance_interval={interval} must be (low, high), levels with "
        "low < high; empty guides all levels"
    )
  return sampling_plan.guide(plan, *interval)


def inversion_plan(
    experiment: build.Experiment,
    nfe: int | None = None,
    noise: float | None = None,
    times: tuple[float, ...] = (),
) -> sampling_plan.Plan:
  """Returns the plan of an inversion.

  Args:
    experiment: gives noise levels and config section `invert`.
    nfe: network evaluations; None is `invert.nfe`.
    noise: standard deviation of the initial noise; None is `invert.noise`.
    times: intermediate times; empty is `invert.times` if their number matches
      nfe, else default times.
  """
  section = experiment.invert
  given, e = section.times, section.noise if noise is None else noise
  if times:
    given = times
  elif nfe is None:
    nfe = section.nfe
  elif nfe != len(given) + 1:
    given = ()
  levels = experiment.levels
  mid = times_between(
      given, nfe, e, levels.sigma_max, experiment.method.rho, "invert"
  )
  plan = sampling_plan.inversion(e, mid, levels)
  _check_end_levels(experiment, plan)
  method = experiment.method
  if not (method.supports_inversion or method.is_denoiser):
    raise errors.UserError(
        "this network maps only from noise to images; inversion and editing "
        f"need one of {registry.methods_with('supports_inversion')}, or a "
        "denoiser"
    )
  return plan


def _check_end_levels(experiment: build.Experiment, plan) -> None:
  low = experiment.levels.sigma_min
  if experiment.method.takes_end_time:
    return
  if any(isinstance(s, sampling_plan.Jump) and s.u != low for s in plan.steps):
    raise errors.UserError(
        f"{plan.name} jumps to other levels than sigma_min, which this "
        "network cannot (model.two_time=False); use sampler 'onestep' or "
        "'cm_multistep', or fine-tune it with "
        f"{registry.methods_with('supports_inversion')}"
    )
