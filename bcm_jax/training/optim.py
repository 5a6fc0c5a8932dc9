"""Optimizers and learning-rate schedules, all from optax."""

import dataclasses
from typing import Literal

import optax

from bcm_jax.training import phema


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Optimizer settings; `build` returns the optax transformation.

  Attributes:
    name: 'radam', 'adam' or 'adamw'.
    learning_rate: peak learning rate.
    schedule: 'constant'; 'cosine' or 'linear', which decay to final_fraction of
      the peak at schedule_steps; or 'rsqrt', which decays as 1 / sqrt(step /
      schedule_steps) from schedule_steps on (EDM2).
    warmup_steps: updates of the linear warm-up from 0.
    schedule_steps: length of the schedule in training steps, including the
      warm-up. A network that is not updated in every step reaches the end at
      the same step, after fewer updates.
    final_fraction: final learning rate as a fraction of the peak.
    b1: decay rate of Adam's first moment.
    b2: decay rate of Adam's second moment.
    eps: Adam's epsilon.
    weight_decay: decoupled weight decay, only for adamw.
    grad_clip: maximum global norm of the gradient; None disables clipping.
  """

  name: Literal["radam", "adam", "adamw"] = "radam"
  learning_rate: float = 1e-4
  schedule: Literal["constant", "cosine", "linear", "rsqrt"] = "constant"
  warmup_steps: int = 0
  schedule_steps: int = 400_000
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  grad_clip: float | None = None

  def rate(self) -> optax.Schedule:
    """Returns the schedule: number of updates -> learning rate."""
    peak, span = self.learning_rate, self.schedule_steps - self.warmup_steps
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(
            peak, max(1, span), self.final_fraction
        ),
        "linear": lambda: optax.linear_schedule(
            peak, peak * self.final_fraction, max(1, span)
        ),
        "rsqrt": lambda: lambda count: phema.learning_rate(
            count, 1, peak, self.schedule_steps, self.warmup_steps
        ),
    }[self.schedule]()
    if not self.warmup_steps or self.schedule == "rsqrt":
      return decay
    warmup = optax.linear_schedule(0.0, peak, self.warmup_steps)
    return optax.join_schedules([warmup, decay], [self.warmup_steps])

  def build(self) -> optax.GradientTransformation:
    """Returns the optax transformation: gradient clipping, then the optimizer.
    """
    moments = dict(b1=self.b1, b2=self.b2, eps=self.eps)
    rate = self.rate()
    core = {
        "radam": lambda: optax.radam(rate, **moments),
        "adam": lambda: optax.adam(rate, **moments),
        "adamw": lambda: optax.adamw(
            rate, weight_decay=self.weight_decay, **moments
        ),
    }[self.name]()
    if self.grad_clip is None:
      return core
    return optax.chain(optax.clip_by_global_norm(self.grad_clip), core)
