"""Plans: what a sampler will do, in sigma units, before it does it.

A plan is a list of jumps x <- f(x, t, u) and noise injections x <- x + e z.
All samplers and inversions of this package are plans; one executor runs them
(`samplers.run`). Times are checked here, NFE is counted here.
"""

from collections.abc import Sequence
import dataclasses
import math

from bcm_jax import errors


@dataclasses.dataclass(frozen=True)
class Jump:
  """x <- f(x, t, u): one network evaluation."""

  t: float
  u: float

  def __str__(self):
    way = "generate" if self.u < self.t else "invert"
    return f"jump   {self.t:g} -> {self.u:g}  ({way})"


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
    return sum(isinstance(s, Jump) for s in self.steps)

  @property
  def end(self) -> float:
    """Noise level of the result."""
    last = self.steps[-1]
    return last.u if isinstance(last, Jump) else last.level

  def __str__(self):
    lines = [f"{self.name}: {self.nfe} NFE, {self.start:g} -> {self.end:g}"]
    lines += [f"  {i + 1:2d}. {step}" for i, step in enumerate(self.steps)]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Range:
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


def ancestral(mid: Sequence[float], levels: Range) -> Plan:
  """sigma_max -> mid[0] -> ... -> sigma_min, no fresh noise.

  One step is `mid` empty. Li & He (BCM, 2024), 'ancestral sampling'.
  """
  times = [levels.sigma_max, *mid, levels.sigma_min]
  levels.check(times, "ancestral time")
  _check_monotone(times, "ancestral times", up=False)
  name = "ancestral" if mid else "onestep"
  return Plan(name, levels.sigma_max, _jumps(times))


def _zigzag_steps(pairs, levels: Range) -> tuple[Jump | AddNoise, ...]:
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


def zigzag(pairs: Sequence[tuple[float, float]], levels: Range) -> Plan:
  """One step, then for each (e, t): add e z, jump e -> t -> sigma_min.

  1 + 2 len(pairs) NFE. Li & He (BCM, 2024), 'zigzag sampling': the injected
  noise is small, so that content is kept; the network itself amplifies it.
  """
  return mixture((), pairs, levels, name="zigzag")


def mixture(
    mid: Sequence[float],
    pairs: Sequence[tuple[float, float]],
    levels: Range,
    name: str = "mixture",
) -> Plan:
  """Ancestral through `mid`, then zigzag by `pairs`."""
  first = ancestral(mid, levels)
  return Plan(
      name, levels.sigma_max, first.steps + _zigzag_steps(pairs, levels)
  )


def cm_multistep(mid: Sequence[float], levels: Range) -> Plan:
  """Denoise, add fresh noise to the next level, denoise, ...

  Song et al. (CM, 2023), algorithm 1: sqrt(t^2 - sigma_min^2) z is added to
  reach level t.
  """
  times = [levels.sigma_max, *mid]
  levels.check(times, "multistep time")
  _check_monotone(times, "multistep times", up=False)
  steps: list[Jump | AddNoise] = [Jump(times[0], levels.sigma_min)]
  for t in times[1:]:
    scale = math.sqrt(t**2 - levels.sigma_min**2)
    steps += [AddNoise(scale, t), Jump(t, levels.sigma_min)]
  return Plan("cm_multistep", levels.sigma_max, tuple(steps))


def inversion(noise: float, mid: Sequence[float], levels: Range) -> Plan:
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
