"""Sampling plans: samplers and inversions as lists of steps.

A plan is a list of jumps x <- f(x, t, u), Heun steps and noise injections
x <- x + e z. Noise levels are in sigma units. `samplers.run` executes plans;
this module checks their levels and counts their network evaluations (NFE).
"""

from collections.abc import Sequence
import dataclasses
import math

from bcm_jax import errors
from bcm_jax.diffusion import solvers


@dataclasses.dataclass(frozen=True)
class Jump:
  """Jump x <- f(x, t, u), one network evaluation.

  Attributes:
    t, u: noise levels before and after.
    guided: use the guided map, see sampling.guidance.
    clip: clip the result to [-1, 1].
  """

  t: float
  u: float
  guided: bool = False
  clip: bool = False

  NFE, WORD = 1, "jump "

  def __str__(self):
    direction = "generate" if self.u < self.t else "invert"
    guided = ", guided" if self.guided else ""
    clip = ", clip" if self.clip else ""
    return (
        f"{self.WORD}  {self.t:g} -> {self.u:g}  ({direction}{guided}{clip})"
    )


@dataclasses.dataclass(frozen=True)
class HeunJump(Jump):
  """Heun step from t to u, two network evaluations.

  Requires a flow map f that is Euler's step. y = f(x, t, u), then
  x <- y + (x - f(y, u, t)) / 2. For Euler's step, half of the round-trip error
  x - f(y, u, t) is the correction of the trapezoidal rule (Karras et al., EDM,
  2022, algorithm 1).
  """

  NFE, WORD = 2, "heun "


@dataclasses.dataclass(frozen=True)
class AddNoise:
  """Noise injection x <- x + scale z, z ~ N(0, I), to noise level `level`."""

  scale: float
  level: float

  def __str__(self):
    return f"noise  + {self.scale:g} z  (level {self.level:g})"


@dataclasses.dataclass(frozen=True)
class Plan:
  """Ordered list of steps.

  Attributes:
    name: name of the sampler.
    start: noise level of the input.
    steps: jumps and noise injections.
  """

  name: str
  start: float
  steps: tuple[Jump | AddNoise, ...]

  @property
  def nfe(self) -> int:
    """Number of network evaluations, without those of a guidance network."""
    return sum(s.NFE for s in self.steps if isinstance(s, Jump))

  @property
  def guide_nfe(self) -> int:
    """Number of evaluations of the guidance network, in addition to `nfe`."""
    return sum(
        s.NFE for s in self.steps if isinstance(s, Jump) and s.guided
    )

  @property
  def end(self) -> float:
    """Noise level of the output."""
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
  """Range of noise levels [sigma_min, sigma_max] in training."""

  sigma_min: float = 0.002
  sigma_max: float = 80.0

  def check(self, times: Sequence[float], name: str) -> None:
    """Raises UserError for a level outside [sigma_min, sigma_max]."""
    for t in times:
      if not (math.isfinite(t) and self.sigma_min <= t <= self.sigma_max):
        raise errors.UserError(
            f"{name}: got {t:g}, expected a noise level in "
            f"[{self.sigma_min:g}, {self.sigma_max:g}], the range of training;"
            " give times in sigma units"
        )


def _check_monotone(times: Sequence[float], name: str, up: bool) -> None:
  pairs = zip(times, times[1:], strict=False)
  if any((b <= a) if up else (b >= a) for a, b in pairs):
    order = "increasing" if up else "decreasing"
    raise errors.UserError(
        f"{name}: got {', '.join(f'{t:g}' for t in times)}, expected strictly "
        f"{order} levels; reorder them"
    )


def _jumps(times: Sequence[float]) -> tuple[Jump, ...]:
  return tuple(
      Jump(t, u) for t, u in zip(times[:-1], times[1:], strict=True)
  )


def ancestral(mid: Sequence[float], levels: NoiseRange) -> Plan:
  """Returns ancestral sampling (Li & He, BCM, 2024).

  Jumps sigma_max -> mid[0] -> ... -> sigma_min without fresh noise,
  len(mid) + 1 NFE. An empty `mid` is one-step sampling.

  Raises:
    UserError: a level outside of the range, or levels not decreasing.
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
          f"zigzag pair: got noise amplification from {noise:g} to {up:g}, "
          "expected a higher level; give pairs (noise, level) with noise < "
          "level"
      )
    # The paper uses `noise`, not sqrt(noise^2 - sigma_min^2).
    steps += [
        AddNoise(noise, noise),
        Jump(noise, up),
        Jump(up, levels.sigma_min),
    ]
  return tuple(steps)


def zigzag(pairs: Sequence[tuple[float, float]], levels: NoiseRange) -> Plan:
  """Returns zigzag sampling (Li & He, BCM, 2024).

  One-step sampling, then for each pair (e, t): adds e z and jumps
  e -> t -> sigma_min; 1 + 2 len(pairs) NFE. The added noise e is small, which
  preserves the content; the network amplifies it to level t.

  Raises:
    UserError: a level outside of the range, or a pair with t <= e.
  """
  return mixture((), pairs, levels, name="zigzag")


def mixture(
    mid: Sequence[float],
    pairs: Sequence[tuple[float, float]],
    levels: NoiseRange,
    name: str = "mixture",
) -> Plan:
  """Returns ancestral sampling through `mid`, then zigzags with `pairs`."""
  first = ancestral(mid, levels)
  return Plan(
      name, levels.sigma_max, first.steps + _zigzag_steps(pairs, levels)
  )


def zigzags(pairs: Sequence[tuple[float, float]], levels: NoiseRange) -> Plan:
  """Returns zigzags from an image: add e z, jump e -> t ->
  sigma_min,
  repeat."""
  if not pairs:
    raise errors.UserError("zigzags: got no pairs, expected at least one "
                           "(noise, level)")
  return Plan("zigzags", levels.sigma_min, _zigzag_steps(pairs, levels))


def cm_multistep(
    mid: Sequence[float], levels: NoiseRange, start: float | None = None,
    clip: bool = True,
) -> Plan:
  """Returns multistep consistency sampling (Song et al., 2023, algorithm 1).

  Alternates denoising to sigma_min with noise sqrt(t^2 - sigma_min^2) z that
  reaches the next level t of `mid`. The first level is sigma_max, or `start`.
  With `clip`, denoised images are clipped to [-1, 1], as in the released code.

  Raises:
    UserError: a level outside of the range, or levels not decreasing.
  """
  times = [levels.sigma_max if start is None else start, *mid]
  levels.check(times, "multistep time")
  _check_monotone(times, "multistep times", up=False)
  low = levels.sigma_min
  steps: list[Jump | AddNoise] = [Jump(times[0], low, clip=clip)]
  for t in times[1:]:
    scale = math.sqrt(t**2 - low**2)
    steps += [AddNoise(scale, t), Jump(t, low, clip=clip)]
  return Plan("cm_multistep", times[0], tuple(steps))


def inversion(noise: float, mid: Sequence[float], levels: NoiseRange) -> Plan:
  """Returns the inversion of an image (Li & He, BCM, 2024).

  Adds noise e = `noise`, then jumps e -> mid[0] -> ... -> sigma_max,
  len(mid) + 1 NFE. The noise (0.07 in the paper) avoids the lowest levels,
  where the network is least accurate.

  Raises:
    UserError: a level outside of the range, or levels not increasing.
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
  """Returns gamma-sampling (Kim et al., CTM, 2024, algorithm 3).

  As in the released code: jumps from t_k to s_k = sqrt(1 - gamma^2)
  (t_{k+1} - sigma_min) + sigma_min, then adds noise up to t_{k+1}; the last
  jump ends at sigma_min. gamma = 0 is `ancestral`, gamma = 1 `cm_multistep`
  without clipping.

  Raises:
    UserError: gamma outside of [0, 1], a level outside of the range, or levels
      not decreasing.
  """
  if not 0 <= gamma <= 1:
    raise errors.UserError(f"gamma: got {gamma}, expected a number in [0, 1]")
  times = [levels.sigma_max, *mid, levels.sigma_min]
  levels.check(times, "gamma-sampling time")
  _check_monotone(times, "gamma-sampling times", up=False)
  low, rest = levels.sigma_min, math.sqrt(1 - gamma**2)
  steps: list[Jump | AddNoise] = []
  for t, u in zip(times, times[1:], strict=False):
    s = rest * (u - low) + low
    steps.append(Jump(t, s))
    if u > low and gamma:
      steps.append(AddNoise(math.sqrt(u**2 - s**2), u))
  return Plan("gamma", levels.sigma_max, tuple(steps))


def ode(
  sigmas: Sequence[float], churn: solvers.Churn, heun: bool, levels: NoiseRange
) -> Plan:
  """Returns EDM's sampler (Karras et al., 2022, algorithms 1 and 2).

  Steps through N levels and then to 0, the last step by Euler; N NFE, or
  2 N - 1 with Heun steps. The flow map must be Euler's step.

  Args:
    sigmas: [N] decreasing noise levels.
    churn: noise added before each step, algorithm 2.
    heun: Heun steps instead of Euler steps.
    levels: range of noise levels in training.

  Raises:
    UserError: a level outside of the range, or levels not decreasing.
  """
  levels.check(sigmas, "grid level")
  _check_monotone(sigmas, "grid levels", up=False)
  steps: list[Jump | AddNoise] = []
  for t, u in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
    t_hat = t * (1 + churn.gamma(t, len(sigmas)))
    if t_hat > t:
      scale = churn.s_noise * math.sqrt(t_hat**2 - t**2)
      steps.append(AddNoise(scale, t_hat))
    steps.append((HeunJump if heun and u else Jump)(t_hat, u))
  name = "heun" if heun else "ddim"
  return Plan(
    name + ("_churn" if churn.s_churn else ""), sigmas[0], tuple(steps)
  )


def guide(plan: Plan, low: float = 0.0, high: float = math.inf) -> Plan:
  """Enables guidance in an interval (Kynkaanniemi et al., 2024).

  Guides jumps with start level low < t <= high; the start level of a Heun step
  decides for both of its evaluations.
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
