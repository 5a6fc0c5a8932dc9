"""Variance-exploding diffusion process x_t = x_0 + t z, z ~ N(0, I).

The noise level is sigma(t) = t (Karras et al., 2022, table 1), so all times are
in units of sigma.
"""

import jax
import jax.numpy as jnp


def expand(t: jax.Array, ndim: int) -> jax.Array:
  """Appends axes to t [B] to broadcast it against an array [B, ...]."""
  return t.reshape(t.shape + (1,) * (ndim - t.ndim))


def add_noise(x0: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
  """Returns x_t = x_0 + t z for x0, z [B, ...] and t [B] or scalar."""
  return x0 + expand(jnp.asarray(t), x0.ndim) * z


def ode_velocity(x: jax.Array, t: jax.Array, denoised: jax.Array) -> jax.Array:
  """Computes dx/dt = (x - D(x, t)) / t of the probability-flow ODE.

  Karras et al. (2022), eqs. 1 and 3.

  Args:
    x: [B, ...] at level t.
    t: [B] or scalar.
    denoised: D(x, t), [B, ...].
  """
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
