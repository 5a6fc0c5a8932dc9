"""The variance-exploding process x_t = x_0 + t z, z ~ N(0, I).

Its noise level sigma(t) is t itself, so times are in units of sigma wherever
they appear in this package.
"""

import jax
import jax.numpy as jnp


def expand(t: jax.Array, ndim: int) -> jax.Array:
  """Appends axes to t [B], to broadcast against an ndim-array [B, ...]."""
  return t.reshape(t.shape + (1,) * (ndim - t.ndim))


def add_noise(x0: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
  """Returns x_t = x_0 + t z for x0, z [B, ...] and t [B] or scalar."""
  return x0 + expand(jnp.asarray(t), x0.ndim) * z


def ode_velocity(x: jax.Array, t: jax.Array, denoised: jax.Array) -> jax.Array:
  """Probability-flow ODE dx/dt = (x - D(x, t)) / t (Karras et al., eq. 3)."""
  return (x - denoised) / expand(jnp.asarray(t), x.ndim)


def normal_like(
    keys: jax.Array, x: jax.Array, number: int | jax.Array | None = None
) -> jax.Array:
  """Draws standard normal noise of the shape of x [B, ...].

  Args:
    keys: one per example, [B].
    x: gives shape and dtype.
    number: folded into each key first, for several draws from the same keys.
  """
  if number is not None:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
  return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
