"""Executes plans; draws the start noise of generation."""

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
# A jump with the noise before it, if any: [(index in the plan, step), ...].
Turn = list[tuple[int, Any]]

# `run_rolled` lays out plans of up to this many evaluations.
UNROLLED = 16


def start_noise(
    keys: jax.Array, shape: tuple[int, ...], sigma_max: float
) -> jax.Array:
  """Draws sigma_max z [B, *shape] from one key per image, keys [B]."""
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
    plan: the jumps and noise injections.
    flow_map: f(x, t, u, labels) with t, u of shape [B].
    x: [B, ...] at level plan.start.
    labels: [B] int or None.
    keys: [B] keys for the noise that the plan adds, one per example; step i of
      the plan uses fold_in(key, i).
    guided_map: for the plan's guided jumps, see sampling.guidance.
    at_image: applied after each jump to plan.end; zero-shot editing puts the
      known part of an image back.

  Returns:
    [B, ...] at level plan.end, not clipped.

  Raises:
    ValueError: the plan adds noise without keys, or is guided without a guided
      map.
  """
  if plan.guide_nfe and guided_map is None:
    raise ValueError(f"{plan.name} is guided and needs a guided map")
  batch, wide = x.shape[:1], jnp.promote_types(jnp.float32, x.dtype)
  for i, step in enumerate(plan.steps):
    if isinstance(step, sampling_plan.AddNoise):
      if keys is None:
        raise ValueError(f"{plan.name} adds noise and needs keys")
      x = x + step.scale * process.normal_like(keys, x, i)
    else:
      f = guided_map if step.guided else flow_map
      t = jnp.full(batch, step.t, wide)
      u = jnp.full(batch, step.u, wide)
      y = f(x, t, u, labels)
      if isinstance(step, sampling_plan.HeunJump):
        y = y + (x - f(y, u, t, labels)) / 2
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
  """`run` with plans of more than UNROLLED evaluations as loops.

  XLA's compile time grows with the number of evaluations that a program lays
  out: hours for a solver of a hundred. Steps that differ only in their levels
  become one `lax.scan`. On CPUs a loop runs slower, so short plans stay
  unrolled.

  Args:
    plan: ends in a jump.
    flow_map, guided_map, x, labels, keys: as `run`.

  Returns:
    [B, ...] at level plan.end.
  """
  if plan.nfe <= UNROLLED:
    return run(plan, flow_map, x, labels, keys, guided_map)

  def apply(x, place, step):
    if isinstance(step, sampling_plan.AddNoise):
      return x + step.scale * process.normal_like(keys, x, place)
    single = sampling_plan.Plan(plan.name, step.t, (step,))
    return run(single, flow_map, x, labels, None, guided_map)

  def numbers(step):  # The first two fields.
    return dataclasses.astuple(step)[:2]

  for turns in alike(plan):
    pattern = [step for _, step in turns[0]]

    def body(x, turn, pattern=pattern):
      for step, place, values in zip(pattern, *turn, strict=True):
        a, b = (field.name for field in dataclasses.fields(step)[:2])
        step = dataclasses.replace(step, **{a: values[0], b: values[1]})
        x = apply(x, place, step)
      return x, None

    places = np.array([[i for i, _ in turn] for turn in turns], np.int32)
    levels = np.array([[numbers(s) for _, s in t] for t in turns], np.float32)
    x, _ = jax.lax.scan(body, x, (places, levels))
  return x


def alike(plan: sampling_plan.Plan) -> Iterator[list[Turn]]:
  """Yields runs of consecutive turns that differ only in their numbers."""
  turns: list[Turn] = [[]]
  for place, step in enumerate(plan.steps):
    turns[-1].append((place, step))
    if isinstance(step, sampling_plan.Jump):
      turns.append([])

  def kind(turn):
    return [(type(step), getattr(step, "guided", None)) for _, step in turn]

  for _, similar in itertools.groupby(turns[:-1], kind):
    yield list(similar)
