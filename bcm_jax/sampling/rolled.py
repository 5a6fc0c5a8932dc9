"""Long plans as loops, for programs that are compiled as a whole.

A compiler takes its time for every evaluation that a program lays out, so a
solver of a hundred of them would take minutes or hours. Steps that differ in
their levels alone become one loop. On CPUs a loop runs slower, so plans of few
evaluations stay as they are.
"""

from collections.abc import Iterator
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from bcm_jax.diffusion import process
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan

UNROLLED = 16

# A jump with the noise before it, if any: [(place in the plan, step), ...].
Turn = list[tuple[int, Any]]


def run(
    plan: sampling_plan.Plan,
    flow_map: samplers.FlowMap,
    guided_map: samplers.FlowMap | None,
    x: jax.Array,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
  """samplers.run; plans of more than UNROLLED evaluations as loops.

  Args:
    plan: ends in a jump.
    flow_map, guided_map, x, labels, keys: as samplers.run.

  Returns:
    [B, ...] at level plan.end.
  """
  if plan.nfe <= UNROLLED:
    return samplers.run(plan, flow_map, x, labels, keys, guided_map)

  def apply(x, place, step):
    if isinstance(step, sampling_plan.AddNoise):
      fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      return x + step.scale * process.normal_like(fold(keys, place), x)
    alone = sampling_plan.Plan(plan.name, step.t, (step,))
    return samplers.run(alone, flow_map, x, labels, None, guided_map)

  for turns in alike(plan):
    pattern = [step for _, step in turns[0]]

    def body(x, turn, pattern=pattern):
      for step, place, levels in zip(pattern, *turn, strict=True):
        x = apply(x, place, _with_levels(step, levels))
      return x, None

    places = np.array([[i for i, _ in turn] for turn in turns], np.int32)
    levels = np.array([[_levels(s) for _, s in t] for t in turns], np.float32)
    x, _ = jax.lax.scan(body, x, (places, levels))
  return x


def _levels(
  step: sampling_plan.Jump | sampling_plan.AddNoise,
) -> tuple[float, float]:
  """The two numbers of a step, its first fields."""
  return dataclasses.astuple(step)[:2]


def _with_levels(
  step, levels: jax.Array
) -> sampling_plan.Jump | sampling_plan.AddNoise:
  """The step with other numbers, also traced ones."""
  names = [field.name for field in dataclasses.fields(step)[:2]]
  return dataclasses.replace(step, **{names[0]: levels[0], names[1]: levels[1]})


def alike(plan: sampling_plan.Plan) -> Iterator[list[Turn]]:
  """Stretches of turns that differ in numbers alone."""
  turns: list[Turn] = [[]]
  for place, step in enumerate(plan.steps):
    turns[-1].append((place, step))
    if isinstance(step, sampling_plan.Jump):
      turns.append([])

  def kind(turn):
    return [(type(step), getattr(step, "guided", None)) for _, step in turn]

  for _, stretch in itertools.groupby(turns[:-1], kind):
    yield list(stretch)
