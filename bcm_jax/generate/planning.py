"""What a config asks a sampler or an inversion to do: plans with their times.

A sampler is written 'ancestral' (with the times of section sample),
'ancestral:4' (four evaluations, at those times if they fit, else at default
ones) or 'mixture@3/0.12>0.4' (these times, in sigma: intermediate ones, and
pairs 'e>t' of a zigzag).
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import schema
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.sampling import sampling_plan as plans

SAMPLERS = ("onestep", "ancestral", "zigzag", "mixture", "cm_multistep",
            "gamma", "ddim", "heun")
_TAKES_TIMES = ("ancestral", "mixture", "cm_multistep", "gamma")
# Solvers of the ODE, on a grid of their own.
_SOLVERS = ("ddim", "heun")
_TAKES_PAIRS = ("zigzag", "mixture")
# Published zigzag of the three-step sampler on ImageNet-64 (Li & He, 2024).
_ZIGZAG = ((0.1, 1.2),)

Pairs = tuple[tuple[float, float], ...]


class Request(NamedTuple):
  """A sampler as it was written.

  Attributes:
    name: one of SAMPLERS.
    nfe: number of evaluations, or None.
    times: intermediate times; None where none were written.
    pairs: zigzag's (e, t); None where none were written.
  """

  name: str
  nfe: int | None = None
  times: tuple[float, ...] | None = None
  pairs: Pairs | None = None


def parse(text: str) -> Request:
  """Reads the notation above.

  Raises:
    UserError: unknown sampler, or numbers that are none.
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
        "leave them out or choose 'mixture'"
    )
  return Request(name, nfe, times, pairs)


def _parse_times(text: str) -> tuple[tuple[float, ...], Pairs]:
  parts = [p for p in text.split("/") if p]
  pairs = [tuple(float(v) for v in p.split(">")) for p in parts if ">" in p]
  if any(len(p) != 2 for p in pairs):
    raise ValueError("a zigzag is e>t")
  return tuple(float(p) for p in parts if ">" not in p), tuple(pairs)


def write(name: str, times: Sequence[float], pairs: Pairs = ()) -> str:
  """The notation of a sampler with these times."""
  parts = [f"{t:g}" for t in times] + [f"{e:g}>{t:g}" for e, t in pairs]
  return f"{name}@{'/'.join(parts)}" if parts else name


def _mid_times(
    start: float, end: float, count: int, rho: float
) -> tuple[float, ...]:
  """Interior points of a Karras grid from start to end, either direction."""
  low, high = min(start, end), max(start, end)
  inner = schedules.karras_sigmas(count + 2, low, high, rho)[1:-1]
  return tuple(float(t) for t in (inner if start < end else inner[::-1]))


def times_between(
    given: Sequence[float], nfe: int | None, start, end, rho, section: str
) -> tuple[float, ...]:
  """Intermediate times: those given, or default ones for an NFE."""
  if given:
    if nfe is not None and nfe != len(given) + 1:
      raise errors.UserError(
          f"{section}.nfe={nfe} needs {nfe - 1} intermediate times, but "
          f"{section}.times has {len(given)}; leave one of the two out"
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


def sampling_plan(
    experiment: build.Experiment, sampler: str | None = None
) -> plans.Plan:
  """The plan of section sample, or of another sampler.

  Args:
    experiment: whose levels and section sample count.
    sampler: in the notation above; None is section sample's own.

  Raises:
    UserError: unknown sampler, times that do not fit, or a sampler that
      needs end levels which the network does not take.
  """
  sample = experiment.sample
  request = parse(sampler or sample.sampler)
  name, nfe, given = request.name, request.nfe, sample.times
  if sampler is None or (nfe is None and name == sample.sampler):
    nfe = sample.nfe
  if name in _SOLVERS:
    return _guided(experiment, _solver_plan(experiment, name, nfe))
  pairs = request.pairs
  if request.times is not None:  # '@': nothing but what was written.
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
        "evaluations; leave sample.nfe out or change the times"
    )
  _check_end_levels(experiment, plan)
  return _guided(experiment, plan)


def _plan(
    name: str, mid, pairs: Pairs, gamma: float, levels: plans.NoiseRange
) -> plans.Plan:
  return {
      "onestep": lambda: plans.ancestral((), levels),
      "ancestral": lambda: plans.ancestral(mid, levels),
      "zigzag": lambda: plans.zigzag(pairs, levels),
      "mixture": lambda: plans.mixture(mid, pairs, levels),
      "cm_multistep": lambda: plans.cm_multistep(mid, levels),
      "gamma": lambda: plans.gamma_sampling(mid, gamma, levels),
  }[name]()


def _solver_plan(
    experiment: build.Experiment, name: str, nfe: int | None
) -> plans.Plan:
  """A solver's plan; nfe None takes sample.num_levels."""
  sample = experiment.sample
  if not experiment.method.is_denoiser:
    raise errors.UserError(
        f"sampler {name!r} solves the ODE of a denoiser, and this network "
        "learnt to jump; use 'onestep', 'ancestral' or 'cm_multistep'"
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
  return plans.ode(sigmas, churn, name == "heun", levels)


def _guided(
    experiment: build.Experiment, plan: plans.Plan
) -> plans.Plan:
  """The plan with the guidance that section sample asks for."""
  sample = experiment.sample
  if sample.guidance == 1.0:
    return plan
  if not experiment.method.is_denoiser:
    raise errors.UserError(
        f"sample.guidance={sample.guidance} guides denoisers, and this network "
        "learnt to jump; set sample.guidance=1"
    )
  interval = sample.guidance_interval
  if interval and not (len(interval) == 2 and interval[0] < interval[1]):
    raise errors.UserError(
        f"sample.guidance_interval={interval} must be (low, high), levels with "
        "low < high; empty guides all levels"
    )
  return plans.guide(plan, *interval)


def inversion_plan(
    experiment: build.Experiment,
    nfe: int | None = None,
    noise: float | None = None,
    times: tuple[float, ...] = (),
) -> plans.Plan:
  """The plan of section invert, or one of another NFE, initial noise or times.

  Intermediate times are those given, those of section invert where they fit,
  or default ones.
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
  plan = plans.inversion(e, mid, levels)
  _check_end_levels(experiment, plan)
  method = experiment.method
  if not (method.supports_inversion or method.is_denoiser):
    raise errors.UserError(
        "this network only goes from noise to images; inverting and editing "
        f"take one of {registry.methods_with('supports_inversion')}, or a "
        "denoiser"
    )
  return plan


def _check_end_levels(experiment: build.Experiment, plan) -> None:
  low = experiment.levels.sigma_min
  if experiment.method.takes_end_time:
    return
  if any(isinstance(s, plans.Jump) and s.u != low for s in plan.steps):
    raise errors.UserError(
        f"{plan.name} jumps to other levels than sigma_min, which this "
        "network cannot (model.two_time=False); use sampler 'onestep' or "
        "'cm_multistep', or fine-tune it with "
        f"{registry.methods_with('supports_inversion')}"
    )
