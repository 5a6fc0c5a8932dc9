"""The one executor of plans, and the start noise of generation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.sampling import sampling_plan

FlowMap = Callable[..., jax.Array]


def start_noise(
    keys: jax.Array, shape: tuple[int, ...], sigma_max: float
) -> jax.Array:
  """sigma_max z [B, *shape] from keys [B]: one image's noise is its own."""
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
    plan: what to do.
    flow_map: f(x, t, u, labels) with t, u of shape [B].
    x: [B, ...] at level plan.start.
    labels: [B] int or None.
    keys: [B] keys for the noise that the plan adds, one an example; step i of
      the plan uses fold_in(key, i).
    guided_map: for the plan's guided jumps, see sampling.guidance.
    at_image: applied wherever a jump reaches plan.end, as editing wants.

  Returns:
    [B, ...] at level plan.end, not clipped.

  Raises:
    ValueError: if the plan adds noise and there are no keys, or is guided and
      there is no guided map.
  """
  if plan.guide_nfe and guided_map is None:
    raise ValueError(f"{plan.name} is guided and needs a guided map")
  batch, wide = x.shape[:1], jnp.promote_types(jnp.float32, x.dtype)
  for i, step in enumerate(plan.steps):
    if isinstance(step, sampling_plan.AddNoise):
      if keys is None:
        raise ValueError(f"{plan.name} adds noise and needs keys")
      fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
      x = x + step.scale * process.normal_like(fold(keys, i), x)
    else:
      f = guided_map if step.guided else flow_map
      t = jnp.full(batch, step.t, wide)
      u = jnp.full(batch, step.u, wide)
      y = f(x, t, u, labels)
      if isinstance(step, sampling_plan.HeunJump):
        y = y + (x - f(y, u, t, labels)) / 2
      x = y if at_image is None or step.u != plan.end else at_image(y)
  return x
