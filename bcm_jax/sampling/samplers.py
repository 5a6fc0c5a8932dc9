"""Executes sampling plans and draws the initial noise."""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import process
from bcm_jax.sampling import sampling_plan

FlowMap = Callable[..., jax.Array]
# A jump with the noise injections before it: [(index in the plan, step), ...].
Turn = list[tuple[int, Any]]

# `run_rolled` unrolls plans of at most this many evaluations.
UNROLLED = 16


def start_noise(
    keys: jax.Array, shape: tuple[int, ...], sigma_max: float
) -> jax.Array:
  """Draws sigma_max z, z ~ N(0, I): float32 [B, *shape], one key per image."""
  draw = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))
  return sigma_max * draw(keys)


def run(
    plan: sampling_plan.Plan,
    flow_map: FlowMap,
    x: jax.Array,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
    guided_map: FlowMap | None = None,
    at_image: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Executes a plan.

  Args:
    plan: jumps and noise injections.
    flow_map: f(x, t, u, labels) with levels t, u of shape [B].
    x: [B, ...] at noise level plan.start.
    labels: int [B], or None.
    keys: [B], one key per example for the noise that the plan adds; step i of
      the plan uses fold_in(key, i).
    guided_map: replaces flow_map in guided jumps, see sampling.guidance.
    at_image: applied after each jump to plan.end; zero-shot editing restores
      the known part of an image with it.

  Returns:
    [B, ...] at noise level plan.end, not clipped.

  Raises:
    ValueError: the plan adds noise and keys is None, or has guided jumps and
      guided_map is None.
  """
  if plan.guide_nfe and guided_map is None:
    raise ValueError(f"guided_map: got None for guided plan {plan.name}, "
                     f"expected a function")
  batch, wide = x.shape[:1], jnp.promote_types(jnp.float32, x.dtype)
  for i, step in enumerate(plan.steps):
    if isinstance(step, sampling_plan.AddNoise):
      if keys is None:
        raise ValueError(f"keys: got None for plan {plan.name}, expected one "
                         f"key per example")
      x = x + step.scale * process.normal_like(keys, x, i)
    else:
      f = guided_map if step.guided else flow_map
      t = jnp.full(batch, step.t, wide)
      u = jnp.full(batch, step.u, wide)
      y = f(x, t, u, labels)
      if isinstance(step, sampling_plan.HeunJump):
        y = y + (x - f(y, u, t, labels)) / 2
      if step.clip:
        y = jnp.clip(y, -1, 1)
      x = y if at_image is None or step.u != plan.end else at_image(y)
  return x


def run_rolled(
    plan: sampling_plan.Plan,
    flow_map: FlowMap,
    guided_map: FlowMap | None,
    x: jax.Array,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
  """Executes a plan as `run`, with loops if it is long.

  XLA's compile time grows with the number of unrolled evaluations: hours for a
  solver of a hundred. Steps that differ only in their levels therefore become
  one `lax.scan`. Loops are slower on CPUs, so plans of at most UNROLLED
  evaluations remain unrolled.

  Args:
    plan: a plan whose last step is a jump.
    flow_map, guided_map, x, labels, keys: see `run`.

  Returns:
    [B, ...] at noise level plan.end.
  """
  if plan.nfe <= UNROLLED:
    return run(plan, flow_map, x, labels, keys, guided_map)

  def apply(x, index, step):
    if isinstance(step, sampling_plan.AddNoise):
      return x + step.scale * process.normal_like(keys, x, index)
    single = sampling_plan.Plan(plan.name, step.t, (step,))
    return run(single, flow_map, x, labels, None, guided_map)

  def numbers(step):  # (t, u) of a jump, (scale, level) of noise.
    return dataclasses.astuple(step)[:2]

  for turns in alike(plan):
    pattern = [step for _, step in turns[0]]

    def body(x, turn, pattern=pattern):
      for step, index, values in zip(pattern, *turn, strict=True):
        a, b = (field.name for field in dataclasses.fields(step)[:2])
        step = dataclasses.replace(step, **{a: values[0], b: values[1]})
        x = apply(x, index, step)
      return x, None

    indices = np.array([[i for i, _ in turn] for turn in turns], np.int32)
    levels = np.array([[numbers(s) for _, s in t] for t in turns], np.float32)
    x, _ = jax.lax.scan(body, x, (indices, levels))
  return x


def alike(plan: sampling_plan.Plan) -> Iterator[list[Turn]]:
  """Yields runs of consecutive turns that differ only in their noise levels."""
  turns: list[Turn] = [[]]
  for index, step in enumerate(plan.steps):
    turns[-1].append((index, step))
    if isinstance(step, sampling_plan.Jump):
      turns.append([])

  def kind(turn):
    return [
        (type(s), getattr(s, "guided", None), getattr(s, "clip", None))
        for _, s in turn
    ]

  for _, similar in itertools.groupby(turns[:-1], kind):
    yield list(similar)
