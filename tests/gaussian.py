"""The exact flow map of Gaussian data, the closed form behind many tests.

For data N(0, sd^2 I) and x_t = x_0 + t z the probability-flow ODE carries x
from level t to level u by the factor sqrt((sd^2 + u^2) / (sd^2 + t^2)).
"""

import jax.numpy as jnp

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process

SD = 0.5


def phi(x, t, u):
  """The exact flow map; t and u [B] or scalars."""
  t, u = (process.expand(jnp.asarray(v), x.ndim) for v in (t, u))
  return x * jnp.sqrt((SD**2 + u**2) / (SD**2 + t**2))


def network(x_in, c_noise, c_noise_end):
  """F of `Bidirectional` that realises `phi`, from the network's own inputs.

  F* = x sd (t - u) / (sqrt(A(t)) [sqrt(A(t) A(u)) + t u + sd^2]).
  """
  t, u = (
      process.expand(jnp.exp(c / 250), x_in.ndim)
      for c in (c_noise, c_noise_end)
  )
  a, b = t**2 + SD**2, u**2 + SD**2
  # x_in is x / sqrt(A(t)).
  return x_in * SD * (t - u) / (jnp.sqrt(a * b) + t * u + SD**2)


def flow_map(x, t, u, labels=None):
  """The same map as a learnt one would be called: f(x, t, u, labels)."""
  del labels
  form = preconditioning.Bidirectional(SD)
  return preconditioning.precondition(network, form, x, t, u)
