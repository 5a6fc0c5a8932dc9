"""Preconditioning of denoisers, consistency functions and flow maps.

D = c_skip x + c_out F(c_in x, c_noise) for a raw network F, in the notation of
Karras et al. (EDM, 2022), eq. 7 and table 1. Noise levels t and u are in units
of sigma. Levels and coefficients are [B] arrays or scalars, computed in at
least float32.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.models import dtypes


class Coefficients(NamedTuple):
  """Preconditioning coefficients c_skip, c_out, c_in, each shaped like t."""

  c_skip: jax.Array
  c_out: jax.Array
  c_in: jax.Array


class Preconditioning(Protocol):
  """Maps levels (t, u) to preconditioning coefficients.

  Attributes:
    ends_at_denoiser: whether D at end level 0 is EDM's denoiser.
  """

  ends_at_denoiser: bool

  def __call__(self, t: jax.Array, u: jax.Array) -> Coefficients: ...


@dataclasses.dataclass(frozen=True)
class EDM:
  """Denoiser D(x, t) ~ E[x_0 | x_t] (Karras et al., 2022, table 1).

  The end level u is ignored.
  """

  sigma_data: float = 0.5
  ends_at_denoiser = True

  def __call__(self, t, u=None) -> Coefficients:
    t, sd = dtypes.at_least_float32(t), self.sigma_data
    a = t**2 + sd**2
    return Coefficients(sd**2 / a, t * sd / jnp.sqrt(a), 1 / jnp.sqrt(a))


@dataclasses.dataclass(frozen=True)
class ConsistencyBoundary:
  """Consistency function f(x, t) with f(x, sigma_min) = x.

  Song et al. (2023), appendix C. The end level u is ignored.
  """

  sigma_data: float = 0.5
  sigma_min: float = 0.002
  ends_at_denoiser = False

  def __call__(self, t, u=None) -> Coefficients:
    t, sd = dtypes.at_least_float32(t), self.sigma_data
    a, s = t**2 + sd**2, t - self.sigma_min
    return Coefficients(
        sd**2 / (s**2 + sd**2), s * sd / jnp.sqrt(a), 1 / jnp.sqrt(a)
    )


@dataclasses.dataclass(frozen=True)
class Bidirectional:
  """Flow map f(x, t, u) from level t to level u, in either direction.

  Li & He (BCM, 2024). f(x, t, t) = x for every F, and f(x, t, 0) has the form
  of EDM's denoiser: f is one Euler step from t to u with a denoiser whose F may
  depend on u.
  """

  sigma_data: float = 0.5
  ends_at_denoiser = True

  def __call__(self, t, u) -> Coefficients:
    t, u = dtypes.at_least_float32(t), dtypes.at_least_float32(u)
    sd = self.sigma_data
    a = t**2 + sd**2
    return Coefficients(
        (t * u + sd**2) / a, (t - u) * sd / jnp.sqrt(a), 1 / jnp.sqrt(a)
    )


@dataclasses.dataclass(frozen=True)
class Plain:
  """Network output without preconditioning, D = F(c_in x), with EDM's c_in.

  Inner form 'no' of CTM's released code. The end level u is ignored.
  """

  sigma_data: float = 0.5
  ends_at_denoiser = True

  def __call__(self, t, u=None) -> Coefficients:
    c_in = EDM(self.sigma_data)(t).c_in
    return Coefficients(jnp.zeros_like(c_in), jnp.ones_like(c_in), c_in)


# Values of config.method.outer_skip.
OuterSkip = Literal["euler", "variance", "euler_variance_mixed"]


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """Flow map G(x, t, u) = k(t, u) x + (1 - u/t) g(x, t, u) for u <= t.

  Kim et al. (CTM, 2024), eq. 9, where `inner` is the preconditioning of g and
  k = u/t. With EDM's form for g it equals `Bidirectional`; only the trained
  range of u differs. The released code has two other forms of k
  (karras_diffusion.py, get_outer_scalings).

  Attributes:
    inner: preconditioning of g.
    outer: k: 'euler' u/t; 'variance' v(u, t) = sqrt(((u - sigma_min)^2 +
      sigma_data^2) / ((t - sigma_min)^2 + sigma_data^2));
      'euler_variance_mixed' (u + v) / (t + 1).
    sigma_data, sigma_min: see v.
  """

  inner: Preconditioning = EDM()
  outer: OuterSkip = "euler"
  sigma_data: float = 0.5
  sigma_min: float = 0.002
  # Not relied on: u -> 0 is trained, u = 0 is not.
  ends_at_denoiser = False

  def __call__(self, t, u) -> Coefficients:
    t, u = dtypes.at_least_float32(t), dtypes.at_least_float32(u)
    c_skip, c_out, c_in = self.inner(t)
    rest = (t - u) / t
    return Coefficients(self._skip(t, u) + rest * c_skip, rest * c_out, c_in)

  def _skip(self, t, u) -> jax.Array:
    """Returns k(t, u)."""
    if self.outer == "euler":
      return u / t
    variance = jnp.sqrt(self._variance(u) / self._variance(t))
    return variance if self.outer == "variance" else (u + variance) / (t + 1)

  def _variance(self, t) -> jax.Array:
    return (t - self.sigma_min) ** 2 + self.sigma_data**2

  def denoiser(self, t, u=None) -> Coefficients:
    """Returns the coefficients of the denoiser that G contains.

    D = g(x, t, t) + (1 - t dk/du(t, t)) x, so that G has the slope of the ODE
    at u = t; with 'euler' D is g.
    """
    t = dtypes.at_least_float32(t)
    c_skip, c_out, c_in = self.inner(t)
    slope = (t - self.sigma_min) / self._variance(t)
    rest = {
        "euler": 0.0,
        "variance": 1 - t * slope,
        "euler_variance_mixed": 1 - t * (1 + slope) / (t + 1),
    }[self.outer]
    return Coefficients(c_skip + rest, c_out, c_in)


# Values of config.method.preconditioning.
Name = Literal["edm", "cm", "bcm", "ctm"]


def by_name(
    name: Name, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Preconditioning:
  """Returns the form of a name."""
  return {
      "edm": EDM(sigma_data),
      "cm": ConsistencyBoundary(sigma_data, sigma_min),
      "bcm": Bidirectional(sigma_data),
      "ctm": Trajectory(EDM(sigma_data)),
  }[name]


def edm_weight(t: jax.Array, sigma_data: float) -> jax.Array:
  """Returns EDM's weight of a denoising loss, 1 / c_out^2: [B] -> [B]."""
  return (t**2 + sigma_data**2) / (t * sigma_data) ** 2


def edm_c_noise(t: jax.Array) -> jax.Array:
  """Returns EDM's ln(t) / 4 (table 1); t is floored at 1e-20, never 0."""
  return jnp.log(jnp.maximum(dtypes.at_least_float32(t), 1e-20)) / 4


@dataclasses.dataclass(frozen=True)
class Scaled:
  """c_noise in the units of a network's embedding: factor c_noise(t)."""

  c_noise: Callable[[jax.Array], jax.Array]
  factor: float

  def __call__(self, t: jax.Array) -> jax.Array:
    return self.factor * self.c_noise(t)


# ADM's sinusoids are for timesteps 0 .. 1000: 250 ln t.
ADM_SCALE = 1000.0
adm_c_noise = Scaled(edm_c_noise, ADM_SCALE)


def precondition(
    network: Callable[..., jax.Array],
    coefficients: Preconditioning,
    x: jax.Array,
    t: jax.Array,
    u: jax.Array,
    c_noise: Callable[[jax.Array], jax.Array] = adm_c_noise,
) -> jax.Array:
  """Evaluates D = c_skip x + c_out F(c_in x, c_noise(t), c_noise(u)).

  Args:
    network: F(x, c_noise, c_noise_end) -> [B, ...].
    coefficients: one of the forms above.
    x: [B, ...] image at level t.
    t: [B] start level.
    u: [B] end level.
    c_noise: conditioning value of a level.

  Returns:
    [B, ...], at least float32.
  """
  c_skip, c_out, c_in = (
      process.expand(jnp.broadcast_to(c, x.shape[:1]), x.ndim)
      for c in coefficients(t, u)
  )
  f = network(c_in * x, c_noise(t), c_noise(u))
  return c_skip * x + c_out * f.astype(jnp.promote_types(f.dtype, c_out.dtype))
