"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

Step i integrates from sigmas[i] to sigmas[i + 1]: a decreasing grid generates,
an increasing grid inverts. With churn, each step first increases the noise
level (Karras et al., 2022, algorithm 2).
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import process

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Churn:
  """Stochasticity parameters of Karras et al. (2022), algorithm 2.

  Attributes:
    s_churn: total amount of stochasticity; 0 is deterministic.
    s_tmin, s_tmax: range of sigma with churn.
    s_noise: scale of the standard deviation of the added noise.
  """

  s_churn: float = 0.0
  s_tmin: float = 0.0
  s_tmax: float = math.inf
  s_noise: float = 1.0

  def gamma(self, sigma: float, num_steps: int) -> float:
    """Returns gamma, the relative increase of the noise level at sigma."""
    if not self.s_tmin <= sigma <= self.s_tmax:
      return 0.0
    return min(self.s_churn / num_steps, math.sqrt(2) - 1)


def euler_step(denoiser: Denoiser, x, s, s_next):
  """Euler step from s to s_next: 1 NFE."""
  return x + (s_next - s) * process.ode_velocity(x, s, denoiser(x, s))


def heun_step(denoiser: Denoiser, x, s, s_next):
  """Heun step (trapezoidal rule) from s to s_next > 0: 2 NFE."""
  d = process.ode_velocity(x, s, denoiser(x, s))
  x_next = x + (s_next - s) * d
  d_next = process.ode_velocity(x_next, s_next, denoiser(x_next, s_next))
  return x + (s_next - s) * (d + d_next) / 2


_STEPS = {"euler": euler_step, "heun": heun_step}


def solve(
    denoiser: Denoiser,
    x: jax.Array,
    sigmas: np.ndarray,
    solver: str = "heun",
    churn: Churn = Churn(),
    noise: Noise | None = None,
) -> jax.Array:
  """Solves the probability-flow ODE from sigmas[0] to sigmas[-1].

  Karras et al. (2022), algorithms 1 and 2.

  Args:
    denoiser: D(x, sigma) -> array like x, for a scalar sigma.
    x: [B, ...] at level sigmas[0].
    sigmas: [n + 1] levels on the host, monotone; a decreasing grid may end in
      0, where Heun's step is replaced by Euler's (D at 0 does not exist).
    solver: 'euler' or 'heun'.
    churn: stochasticity.
    noise: step index -> standard normal like x; needed with churn.

  Returns:
    [B, ...] at level sigmas[-1].

  Raises:
    ValueError: churn without noise.
  """
  sigmas = np.asarray(sigmas, np.float64)
  n = len(sigmas) - 1
  gammas = np.array([churn.gamma(s, n) for s in sigmas[:-1]])
  if gammas.any() and noise is None:
    raise ValueError("noise: got None, expected a function with churn")
  hats = sigmas[:-1] * (1 + gammas)
  extra = churn.s_noise * np.sqrt(np.maximum(hats**2 - sigmas[:-1] ** 2, 0))
  step = _STEPS[solver]

  def body(x, inputs, step=step):
    i, hat, s_next, added = inputs
    if gammas.any():
      x = x + added * noise(i)
    return step(denoiser, x, hat, s_next), None

  inputs = (jnp.arange(n),) + tuple(
      jnp.asarray(a, x.dtype) for a in (hats, sigmas[1:], extra)
  )
  if solver == "heun" and sigmas[-1] == 0:
    x, _ = jax.lax.scan(body, x, jax.tree.map(lambda a: a[:-1], inputs))
    last = jax.tree.map(lambda a: a[-1], inputs)
    return body(x, last, step=euler_step)[0]
  return jax.lax.scan(body, x, inputs)[0]
