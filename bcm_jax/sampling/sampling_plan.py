"""Sampling plans: the steps of a sampler, with times in units of sigma.

A plan is a list of jumps x <- f(x, t, u), corrected jumps (Heun's steps) and
noise injections x <- x + e z. All samplers and inversions of this package are
plans; one executor runs them (`samplers.run`). Times are checked here, NFE is
counted here.
"""

from collections.abc import Sequence
import dataclasses
import math

from bcm_jax import errors
from bcm_jax.diffusion import solvers


@dataclasses.dataclass(frozen=True)
class Jump:
  """x <- f(x, t, u): one network evaluation.

  Attributes:
    t, u: levels before and after.
    guided: take the guided map, see sampling.guidance.
  """

  t: float
  u: float
  guided: bool = False

  NFE, WORD = 1, "jump "

  def __str__(self):
    way = "generate" if self.u < self.t else "invert"
    guided = ", guided" if self.guided else ""
    return f"{self.WORD}  {self.t:g} -> {self.u:g}  ({way}{guided})"


@dataclasses.dataclass(frozen=True)
class HeunJump(Jump):
  """Heun's step from t to u, of a map f that is Euler's: two evaluations.

  y = f(x, t, u), then x <- y + (x - f(y, u, t)) / 2: half of what the way
  there and back misses is the trapezoidal rule's correction.
  """

  NFE, WORD = 2, "heun "


@dataclasses.dataclass(frozen=True)
class AddNoise:
  """x <- x + scale z, z ~ N(0, I); the level is `level` afterwards."""

  scale: float
  level: float

  def __str__(self):
    return f"noise  + {self.scale:g} z  (level {self.level:g})"


@dataclasses.dataclass(frozen=True)
class Plan:
  """An ordered list of steps.

  Attributes:
    name: sampler's name.
    start: noise level at which the input is expected.
    steps: jumps and noise injections.
  """

  name: str
  start: float
  steps: tuple[Jump | AddNoise, ...]

  @property
  def nfe(self) -> int:
    """Number of network evaluations."""
    return sum(s.NFE for s in self.steps if isinstance(s, Jump))

  @property
  def guide_nfe(self) -> int:
    """Evaluations of the guidance network, in addition to `nfe`."""
    return sum(
        s.NFE for s in self.steps if isinstance(s, Jump) and s.guided
    )

  @property
  def end(self) -> float:
    """Noise level of the result."""
    last = self.steps[-1]
    return last.u if isinstance(last, Jump) else last.level

  def __str__(self):
    guide = f" + {self.guide_nfe} of the guide" if self.guide_nfe else ""
    lines = [f"{self.name}: {self.nfe} NFE{guide}, "
             f"{self.start:g} -> {self.end:g}"]
    lines += [f"  {i + 1:2d}. {step}" for i, step in enumerate(self.steps)]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class NoiseRange:
  """The noise levels that a network was trained on."""

  sigma_min: float = 0.002
  sigma_max: float = 80.0

  def check(self, times: Sequence[float], what: str) -> None:
    """Raises UserError for a level outside [sigma_min, sigma_max]."""
    for t in times:
      if not (math.isfinite(t) and self.sigma_min <= t <= self.sigma_max):
        raise errors.UserError(
            f"{what} {t:g} lies outside the trained noise levels "
            f"[{self.sigma_min:g}, {self.sigma_max:g}]; give times in sigma "
            "units"
        )


def _check_monotone(times: Sequence[float], what: str, up: bool) -> None:
  pairs = zip(times, times[1:], strict=False)
  if any((b <= a) if up else (b >= a) for a, b in pairs):
    way = "increasing" if up else "decreasing"
    raise errors.UserError(
        f"{what} {', '.join(f'{t:g}' for t in times)} are not strictly {way}; "
        f"reorder them"
    )


def _jumps(times: Sequence[float]) -> tuple[Jump, ...]:
  return tuple(
      Jump(t, u) for t, u in zip(times[:-1], times[1:], strict=True)
  )


def ancestral(mid: Sequence[float], levels: NoiseRange) -> Plan:
  """sigma_max -> mid[0] -> ... -> sigma_min, no fresh noise.

  One step is `mid` empty. Li & He (BCM, 2024), 'ancestral sampling'.
  """
  times = [levels.sigma_max, *mid, levels.sigma_min]
  levels.check(times, "ancestral time")
  _check_monotone(times, "ancestral times", up=False)
  name = "ancestral" if mid else "onestep"
  return Plan(name, levels.sigma_max, _jumps(times))


def _zigzag_steps(pairs, levels: NoiseRange) -> tuple[Jump | AddNoise, ...]:
  steps = []
  for noise, up in pairs:
    levels.check((noise, up), "zigzag time")
    if up <= noise:
      raise errors.UserError(
          f"zigzag amplifies noise from {noise:g} to {up:g}, which is not a "
          "higher level; give pairs (noise, level) with noise < level"
      )
    # Plain `noise`, not sqrt(noise^2 - sigma_min^2): as published.
    steps += [
        AddNoise(noise, noise),
        Jump(noise, up),
        Jump(up, levels.sigma_min),
    ]
  return tuple(steps)


def zigzag(pairs: Sequence[tuple[float, float]], levels: NoiseRange) -> Plan:
  """One step, then for each (e, t): add e z, jump e -> t -> sigma_min.

  1 + 2 len(pairs) NFE. Li & He (BCM, 2024), 'zigzag sampling': the injected
  noise is small, so that content is kept; the network itself amplifies it.
  """
  return mixture((), pairs, levels, name="zigzag")


def mixture(
    mid: Sequence[float],
    pairs: Sequence[tuple[float, float]],
    levels: NoiseRange,
    name: str = "mixture",
) -> Plan:
  """Ancestral through `mid`, then zigzag by `pairs`."""
  first = ancestral(mid, levels)
  return Plan(
      name, levels.sigma_max, first.steps + _zigzag_steps(pairs, levels)
  )


def zigzags(pairs: Sequence[tuple[float, float]], levels: NoiseRange) -> Plan:
  """From an image: for each (e, t) add e z, jump e -> t -> sigma_min."""
  if not pairs:
    raise errors.UserError("zigzags need at least one pair (noise, level)")
  return Plan("zigzags", levels.sigma_min, _zigzag_steps(pairs, levels))


def cm_multistep(
    mid: Sequence[float], levels: NoiseRange, start: float | None = None
) -> Plan:
  """Denoise, add fresh noise to the next level, denoise, ...

  Song et al. (CM, 2023), algorithm 1: sqrt(t^2 - sigma_min^2) z is added to
  reach level t. The first level is sigma_max, or `start`.
  """
  times = [levels.sigma_max if start is None else start, *mid]
  levels.check(times, "multistep time")
  _check_monotone(times, "multistep times", up=False)
  steps: list[Jump | AddNoise] = [Jump(times[0], levels.sigma_min)]
  for t in times[1:]:
    scale = math.sqrt(t**2 - levels.sigma_min**2)
    steps += [AddNoise(scale, t), Jump(t, levels.sigma_min)]
  return Plan("cm_multistep", times[0], tuple(steps))


def inversion(noise: float, mid: Sequence[float], levels: NoiseRange) -> Plan:
  """Add noise e to an image, then jump e -> mid[0] -> ... -> sigma_max.

  len(mid) + 1 NFE. Li & He (BCM, 2024), section on inversion: a network is
  badly trained at the lower end, so a small initial noise (0.07) helps.
  """
  times = [noise, *mid, levels.sigma_max]
  levels.check(times, "inversion time")
  _check_monotone(times, "inversion times", up=True)
  return Plan(
      "inversion", levels.sigma_min, (AddNoise(noise, noise), *_jumps(times))
  )


def gamma_sampling(
    mid: Sequence[float], gamma: float, levels: NoiseRange
) -> Plan:
  """Jump short of the next level by gamma, and add noise up to it.

  Kim et al. (CTM, 2024), algorithm 3, as released: from t_k to s_k =
  sqrt(1 - gamma^2) (t_k+1 - sigma_min) + sigma_min, so that the last jump ends
  at sigma_min. gamma 0 is `ancestral`, 1 is `cm_multistep`.

  Raises:
    UserError: gamma outside [0, 1], or bad levels.
  """
  if not 0 <= gamma <= 1:
    raise errors.UserError(f"gamma is {gamma}; it lies in [0, 1]")
  times = [levels.sigma_max, *mid, levels.sigma_min]
  levels.check(times, "gamma-sampling time")
  _check_monotone(times, "gamma-sampling times", up=False)
  low, rest = levels.sigma_min, math.sqrt(1 - gamma**2)
  steps: list[Jump | AddNoise] = []
  for t, after in zip(times, times[1:], strict=False):
    short = rest * (after - low) + low
    steps.append(Jump(t, short))
    if after > low and gamma:
      steps.append(AddNoise(math.sqrt(after**2 - short**2), after))
  return Plan("gamma", levels.sigma_max, tuple(steps))


def ode(
  sigmas: Sequence[float], churn: solvers.Churn, heun: bool, levels: NoiseRange
) -> Plan:
  """A solver of the ODE on a grid, of a map that is Euler's step.

  Karras et al. (EDM, 2022), algorithms 1 and 2: N levels and then 0, which
  Euler's step reaches; N NFE, or 2 N - 1 by Heun's rule. Churn adds noise
  before a step.
  """
  levels.check(sigmas, "grid level")
  _check_monotone(sigmas, "grid levels", up=False)
  steps: list[Jump | AddNoise] = []
  for t, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
    raised = t * (1 + churn.gamma(t, len(sigmas)))
    if raised > t:
      scale = churn.s_noise * math.sqrt(raised**2 - t**2)
      steps.append(AddNoise(scale, raised))
    steps.append((HeunJump if heun and after else Jump)(raised, after))
  name = "heun" if heun else "ddim"
  return Plan(
    name + ("_churn" if churn.s_churn else ""), sigmas[0], tuple(steps)
  )


def guide(plan: Plan, low: float = 0.0, high: float = math.inf) -> Plan:
  """The plan with guidance in the jumps that start at low < t <= high.

  Kynkaanniemi et al. (2024); both evaluations of a Heun step go by its start.
  """
  return dataclasses.replace(
    plan,
    steps=tuple(
      dataclasses.replace(s, guided=True)
      if isinstance(s, Jump) and low < s.t <= high
      else s
      for s in plan.steps
    ),
  )
