"""Editing of real images through their latents."""

import jax
import jax.numpy as jnp


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """Spherical interpolation between latents, image by image.

  sin((1-w) h) / sin h a + sin(w h) / sin h b with h the angle between the
  flattened a and b; linear where sin h < 1e-4. The result scales with its
  inputs, so latents of any noise level will do.

  Args:
    a, b: [B, ...].
    weight: [B] in [0, 1]; 0 gives a, 1 gives b.

  Returns:
    [B, ...].
  """
  flat_a, flat_b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
  norms = jnp.linalg.norm(flat_a, axis=-1) * jnp.linalg.norm(flat_b, axis=-1)
  cosine = jnp.sum(flat_a * flat_b, axis=-1) / norms
  angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
  sine = jnp.sin(angle)
  near = sine < 1e-4
  safe = jnp.where(near, 1.0, sine)
  wa = jnp.where(near, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
  wb = jnp.where(near, weight, jnp.sin(weight * angle) / safe)
  shape = (-1,) + (1,) * (a.ndim - 1)
  return wa.reshape(shape) * a + wb.reshape(shape) * b
