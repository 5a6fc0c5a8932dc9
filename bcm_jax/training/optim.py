"""Optimisers and learning-rate schedules, all from optax."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimiser by its numbers; `build` gives the optax transformation.

  Attributes:
    name: 'radam', 'adam' or 'adamw'.
    learning_rate: peak rate.
    schedule: 'constant', 'cosine', 'linear' (both to final_fraction of the
      peak at schedule_steps) or 'rsqrt' (flat, then 1/sqrt(step /
      schedule_steps)).
    warmup_steps: steps of linear rise from 0.
    schedule_steps: steps that the schedule spans, warm-up included.
    final_fraction: last rate as a fraction of the peak.
    b1, b2, eps: Adam's moments and epsilon.
    weight_decay: decoupled decay, adamw only.
    grad_clip: bound of the gradient's global norm; None does not clip.
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
    """Learning rate as a function of the number of updates."""
    peak, span = self.learning_rate, self.schedule_steps - self.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(
            peak, max(1, span), self.final_fraction
        ),
        "linear": lambda: optax.linear_schedule(
            peak, peak * self.final_fraction, max(1, span)
        ),
        "rsqrt": lambda: lambda count: peak / jnp.sqrt(
            jnp.maximum(count / max(1, span), 1.0)
        ),
    }[self.schedule]()
    if not self.warmup_steps:
      return after
    rise = optax.linear_schedule(0.0, peak, self.warmup_steps)
    return optax.join_schedules([rise, after], [self.warmup_steps])

  def build(self) -> optax.GradientTransformation:
    """The transformation: clipping, then the optimiser."""
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
