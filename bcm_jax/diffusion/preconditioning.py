"""Preconditionings: how a raw network F becomes a denoiser or a flow map.

Every form reads D = c_skip x + c_out F(c_in x, c_noise). Notation of Karras
et al. (EDM, 2022), table 1; A(t) = t^2 + sigma_data^2 throughout.

Levels are [B] arrays or scalars in sigma units, and so are the results;
everything is computed in float32 or wider.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process


class Scalings(NamedTuple):
  """Factors of D = c_skip x + c_out F(c_in x, c_noise), shaped like t."""

  c_skip: jax.Array
  c_out: jax.Array
  c_in: jax.Array


class Preconditioning(Protocol):
  """A form of D: levels in, factors out."""

  def __call__(self, t: jax.Array, u: jax.Array) -> Scalings: ...


def _wide(t) -> jax.Array:
  t = jnp.asarray(t)
  return t.astype(jnp.promote_types(jnp.float32, t.dtype))


@dataclasses.dataclass(frozen=True)
class EDM:
  """Denoiser D(x, t) ~ E[x_0 | x_t]; the end level is 0 and u is unused."""

  sigma_data: float = 0.5

  def __call__(self, t, u=None) -> Scalings:
    t, sd = _wide(t), self.sigma_data
    a = t**2 + sd**2
    return Scalings(sd**2 / a, t * sd / jnp.sqrt(a), 1 / jnp.sqrt(a))


@dataclasses.dataclass(frozen=True)
class ConsistencyBoundary:
  """Consistency function f(x, t) with f(x, sigma_min) = x; u is unused.

  Song et al. (2023), appendix C.
  """

  sigma_data: float = 0.5
  sigma_min: float = 0.002

  def __call__(self, t, u=None) -> Scalings:
    t, sd = _wide(t), self.sigma_data
    a, s = t**2 + sd**2, t - self.sigma_min
    return Scalings(
        sd**2 / (s**2 + sd**2), s * sd / jnp.sqrt(a), 1 / jnp.sqrt(a)
    )


@dataclasses.dataclass(frozen=True)
class Bidirectional:
  """Flow map f(x, t, u) from level t to level u, in either direction.

  Li & He (BCM, 2024). f(x, t, t) = x holds for every F, and at u = 0 this is
  EDM's denoiser: the form is one Euler step from t to u of a denoiser whose F
  may depend on u.
  """

  sigma_data: float = 0.5

  def __call__(self, t, u) -> Scalings:
    t, u, sd = _wide(t), _wide(u), self.sigma_data
    a = t**2 + sd**2
    return Scalings(
        (t * u + sd**2) / a, (t - u) * sd / jnp.sqrt(a), 1 / jnp.sqrt(a)
    )


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """CTM's G(x, t, u) = (u/t) x + (1 - u/t) g(x, t, u) for u <= t.

  Kim et al. (CTM, 2024), eq. 9. With the EDM form inside it equals
  `Bidirectional`; only the range of u that is trained differs.
  """

  inner: Preconditioning = EDM()

  def __call__(self, t, u) -> Scalings:
    t, u = _wide(t), _wide(u)
    c_skip, c_out, c_in = self.inner(t)
    rest = (t - u) / t
    return Scalings(u / t + rest * c_skip, rest * c_out, c_in)


def edm_weight(t: jax.Array, sigma_data: float) -> jax.Array:
  """EDM's weight of a denoising loss, 1 / c_out^2: levels [B] -> [B]."""
  return (t**2 + sigma_data**2) / (t * sigma_data) ** 2


def adm_noise(t: jax.Array) -> jax.Array:
  """ADM's conditioning value 250 ln t; t is floored at 1e-20, never 0."""
  return 250 * jnp.log(jnp.maximum(_wide(t), 1e-20))


def edm_noise(t: jax.Array) -> jax.Array:
  """EDM's conditioning value ln(t) / 4; t is floored at 1e-20, never 0."""
  return jnp.log(jnp.maximum(_wide(t), 1e-20)) / 4


def precondition(
    network: Callable[..., jax.Array],
    scalings: Preconditioning,
    x: jax.Array,
    t: jax.Array,
    u: jax.Array,
    noise: Callable[[jax.Array], jax.Array] = adm_noise,
) -> jax.Array:
  """Evaluates D = c_skip x + c_out F(c_in x, c_noise(t), c_noise(u)).

  Args:
    network: F(x, c_noise, c_noise_end) -> [B, ...].
    scalings: one of the forms above.
    x: [B, ...] image at level t.
    t: [B] start level.
    u: [B] end level.
    noise: conditioning value of a level.

  Returns:
    [B, ...], float32 or wider.
  """
  c_skip, c_out, c_in = (
      process.expand(jnp.broadcast_to(c, x.shape[:1]), x.ndim)
      for c in scalings(t, u)
  )
  f = network(c_in * x, noise(t), noise(u))
  return c_skip * x + c_out * f.astype(jnp.promote_types(f.dtype, c_out.dtype))
