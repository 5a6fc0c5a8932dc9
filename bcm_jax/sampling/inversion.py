"""From real images to noise and back (Li & He, BCM, 2024)."""

import jax

from bcm_jax.sampling import plan as plans
from bcm_jax.sampling import samplers


def invert(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    plan: plans.Plan,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
  """Maps images [B, H, W, C] in [-1, 1] to latents at level sigma_max.

  Args:
    flow_map: f(x, t, u, labels).
    images: real images.
    plan: from `plan.inversion`.
    labels: [B] classes of the real images, used in every call.
    keys: [B] keys of the small noise added first. Equal keys for two images
      give both the same noise, which interpolation wants.

  Returns:
    [B, H, W, C] of standard deviation about sigma_max.
  """
  return samplers.run(plan, flow_map, images, labels, keys)


def reconstruct(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    inversion: plans.Plan,
    generation: plans.Plan,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Inverts and generates again; returns (latents, reconstructions)."""
  latents = invert(flow_map, images, inversion, labels, keys)
  return latents, samplers.run(generation, flow_map, latents, labels, keys)
