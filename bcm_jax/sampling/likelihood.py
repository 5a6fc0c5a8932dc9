"""Likelihood of images in bits/dim by the probability-flow ODE.

The instantaneous change of variables (Song et al., 2021, section 4.3) gives
the log-density at the smallest noise level sigma_0, in nats,

  log p(x_0) = log N(x_T; 0, sigma_max^2) + int div dx/dsigma dsigma,

with Hutchinson's estimator of the divergence. The step from sigma_0 to the
image is bounded variationally (Kim et al., CTM, 2024): with the noisy image
x + sigma_0 e, the bound subtracts |x - D|^2 / (2 sigma_0^2) - |e|^2 / 2.

The released code of CTM has two errors, both of which lower the reported
bits/dim: it uses the seventh root of sigma_0 in this bound, and it does not
dequantize the images. `legacy_ctm` reproduces them.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate

Denoiser = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]

# Grey levels per unit of the range [-1, 1].
_LEVELS = 127.5
# Start of the integration: tau with sigma(tau) = sigma_0.
_FIRST = 1e-3


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Settings of the likelihood estimate.

  The ODE is integrated over tau in [0, 1] with the noise level sigma(tau) =
  (sigma_min^(1/rho) + tau (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho (Karras
  et al., EDM, 2022, equation 5).

  Attributes:
    sigma_min, sigma_max, rho: constants of sigma(tau).
    tolerance: relative and absolute tolerance of the adaptive solver (RK45).
    legacy_ctm: reproduce the two errors of CTM's released code.
  """

  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  tolerance: float = 1e-4
  legacy_ctm: bool = False

  def root(self, tau):
    """Returns sigma(tau)^(1 / rho)."""
    low, high = (s ** (1 / self.rho) for s in (self.sigma_min, self.sigma_max))
    return low + tau * (high - low)

  def sigma(self, tau):
    """Returns the noise level sigma(tau)."""
    return self.root(tau) ** self.rho

  def speed(self, tau):
    """Returns the derivative d sigma / d tau."""
    low, high = (s ** (1 / self.rho) for s in (self.sigma_min, self.sigma_max))
    return self.rho * self.root(tau) ** (self.rho - 1) * (high - low)


def bits_per_dim(
    denoise: Denoiser,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray | None,
    key: jax.Array,
    settings: Likelihood = Likelihood(),
) -> tuple[np.ndarray, int]:
  """Computes an upper bound of bits/dim, up to the solver's error.

  Args:
    denoise: D(params, x, sigma [B], labels) -> [B, H, W, C].
    params: parameters of the denoiser.
    images: uint8 [B, H, W, C].
    labels: int [B], or None.
    key: key of dequantization, noise and Hutchinson's vectors.
    settings: see Likelihood.

  Returns:
    (bits/dim float64 [B], number of function evaluations; each evaluates the
    denoiser and one Jacobian-vector product).
  """
  keys = jax.random.split(key, 3)
  x = np.asarray(images, np.float64) / _LEVELS - 1
  bits = math.log2(_LEVELS)
  if settings.legacy_ctm:
    bits = 7.0
  else:
    uniform = jax.random.uniform(keys[0], x.shape, minval=-0.5, maxval=0.5)
    x = x + np.asarray(uniform, np.float64) / _LEVELS
  first = settings.sigma(_FIRST)
  e = np.asarray(jax.random.normal(keys[1], x.shape), np.float64)
  start = x + first * e
  residual = _residual(denoise, params, x, start, e, labels, settings)
  end, divergence, calls = _integrate(
      denoise, params, start, labels,
      jax.random.rademacher(keys[2], x.shape, jnp.float32), settings,
  )
  n = x[0].size
  prior = -0.5 * _squares(end / settings.sigma_max) - n * math.log(
      settings.sigma_max * math.sqrt(2 * math.pi)
  )
  log_p = prior + divergence - residual
  return bits - log_p / (n * math.log(2)), calls


def _squares(x: np.ndarray) -> np.ndarray:
  return np.square(x).reshape(len(x), -1).sum(axis=1)


def _residual(denoise, params, x, start, e, labels, settings) -> np.ndarray:
  """Returns the variational bound of the step sigma_0 -> 0: [B], nats."""
  first = settings.sigma(_FIRST)
  sigma = jnp.full(len(x), first, jnp.float32)
  d = np.asarray(
      denoise(params, jnp.asarray(start, jnp.float32), sigma, labels),
      np.float64,
  )
  sigma_0 = settings.root(_FIRST) if settings.legacy_ctm else first
  half_noise = x[0].size / 2 if settings.legacy_ctm else _squares(e) / 2
  return _squares(x - d) / (2 * sigma_0**2) - half_noise


def _integrate(denoise, params, start, labels, probe, settings):
  """Integrates the ODE: (x_T, integrated divergence [B], evaluations)."""
  shape, size = start.shape, start.size

  @jax.jit
  def velocity(params, x, sigma):
    t = jnp.full(shape[0], sigma, jnp.float32)
    d, tangent = jax.jvp(
        lambda x: denoise(params, x, t, labels), (x,), (probe,)
    )
    trace = jnp.sum((probe * tangent).reshape(shape[0], -1), axis=1)
    return (x - d) / sigma, (size // shape[0] - trace) / sigma

  def derivative(tau, y):
    sigma, speed = settings.sigma(tau), settings.speed(tau)
    x = jnp.asarray(y[:size].reshape(shape), jnp.float32)
    v, divergence = velocity(params, x, jnp.float32(sigma))
    flat = np.concatenate([np.ravel(v), np.ravel(divergence)])
    return speed * flat.astype(np.float64)

  y = np.concatenate([start.ravel(), np.zeros(shape[0])])
  solution = integrate.solve_ivp(
      derivative, (_FIRST, 1.0), y, method="RK45",
      rtol=settings.tolerance, atol=settings.tolerance,
  )
  last = solution.y[:, -1]
  return last[:size].reshape(shape), last[size:], solution.nfev
