"""Discretisations of the noise levels, laws of training times, curricula.

Tables are made on the host in float64, at a fixed length whatever N is, and
enter the compiled step as float32 arguments: changing N never recompiles.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


def karras_sigmas(
    num_scales: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> np.ndarray:
  """Ascending grid of num_scales levels (Karras et al., 2022, eq. 5).

  Returns:
    [num_scales] float64; the first is sigma_min, the last sigma_max.
  """
  ramp = np.linspace(0, 1, num_scales, dtype=np.float64)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  sigmas = (low + ramp * (high - low)) ** rho
  sigmas[0], sigmas[-1] = sigma_min, sigma_max
  return sigmas


def lognormal_bins(
    sigmas: np.ndarray, p_mean: float = -1.1, p_std: float = 2.0
) -> np.ndarray:
  """Probability of each interval of a grid under ln sigma ~ N(p_mean, p_std^2).

  The discretised log-normal of iCT (Song & Dhariwal, 2023, eq. 10).

  Returns:
    [len(sigmas) - 1] float64, summing to 1.
  """
  edges = special.erf((np.log(sigmas) - p_mean) / (math.sqrt(2) * p_std))
  mass = np.diff(edges)
  return mass / mass.sum()


def uniform_bins(sigmas: np.ndarray) -> np.ndarray:
  """Equal probability for each interval of a grid (CM-v1)."""
  return np.full(len(sigmas) - 1, 1 / (len(sigmas) - 1))


class GridTables(NamedTuple):
  """A grid of N levels, padded to a length that does not depend on N.

  Attributes:
    sigmas: [L] ascending levels; entries from N on repeat the last.
    cdf: [L] cumulative probability of the start index i + 1 (t = sigmas[i+1],
      t2 = sigmas[i]): cdf[k] = P(start index <= k), so cdf[0] = 0.
    end_cdf: [L] cumulative probability of the end index of a jump.
  """

  sigmas: np.ndarray
  cdf: np.ndarray
  end_cdf: np.ndarray


@functools.lru_cache(maxsize=512)
def grid_tables(
    num_scales: int,
    length: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    time_distribution: str = "lognormal",
    p_mean: float = -1.1,
    p_std: float = 2.0,
    include_T: bool = True,  # noqa: N803 (the literature's T)
) -> GridTables:
  """Builds the tables of one N, in float32, from float64 arithmetic.

  Args:
    num_scales: N, number of levels.
    length: L >= N, length of the padded tables.
    time_distribution: 'lognormal' or 'uniform' law of the interval.
    include_T: let start and end levels reach sigma_max. End levels are drawn
      as left edges of intervals; with include_T sigma_max gets the weight of
      the last interval too. False leaves the last interval out, as the
      published BCM code does: the largest level that it ever trains is then
      sigmas[N - 2], which is 45.3 at N = 11.

  Returns:
    Tables of shape [length].
  """
  sigmas = karras_sigmas(num_scales, sigma_min, sigma_max, rho)
  law = {"uniform": uniform_bins}.get(time_distribution)
  mass = law(sigmas) if law else lognormal_bins(sigmas, p_mean, p_std)
  end = np.zeros(num_scales)
  end[:-1] = mass
  start = np.zeros(num_scales)
  start[1:] = mass
  if include_T:
    end[-1] = mass[-1]
  else:
    start[-1] = 0.0
  pad = length - num_scales
  cdf = [np.cumsum(p) / p.sum() for p in (start, end)]
  return GridTables(
      np.pad(sigmas, (0, pad), mode="edge").astype(np.float32),
      *(np.pad(c, (0, pad), constant_values=1.0).astype(np.float32)
        for c in cdf),
  )


def sample_index(cdf: jax.Array, uniform: jax.Array) -> jax.Array:
  """Inverts a cumulative table [L] at uniforms in [0, 1); int32."""
  # A uniform shifted past a hole may round to 1, which no entry exceeds.
  uniform = jnp.minimum(uniform, 1 - jnp.finfo(uniform.dtype).epsneg)
  index = jnp.searchsorted(cdf, uniform, side="right")
  return jnp.minimum(index, cdf.shape[0] - 1).astype(jnp.int32)


def sample_other_index(
    cdf: jax.Array, excluded: jax.Array, uniform: jax.Array
) -> jax.Array:
  """Draws an index of a table, given that it is not `excluded`.

  The inverse distribution function with the excluded index's mass cut out: a
  draw beyond the cut is shifted past it.

  Args:
    cdf: [L] cumulative probabilities.
    excluded: int32 scalar or array.
    uniform: uniforms in [0, 1) of the same shape.

  Returns:
    Indices of the same shape, never equal to excluded.
  """
  below = jnp.where(excluded > 0, cdf[jnp.maximum(excluded - 1, 0)], 0.0)
  mass = cdf[excluded] - below
  r = uniform * (1 - mass)
  index = sample_index(cdf, jnp.where(r >= below, r + mass, r))
  # Rounding may land on the cut itself; its neighbour has the next draw.
  step = jnp.where(excluded > 0, -1, 1)
  return jnp.where(index == excluded, excluded + step, index)


def doubling_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """iCT's N(k) = min(s1, s0 2^floor(k / K')) + 1, an equal time each stage.

  K' = floor(K / (log2(s1 / s0) + 1)) (Song & Dhariwal, 2023, section 3.4).
  """
  stage_steps = max(1, math.floor(total_steps / (math.log2(s1 / s0) + 1)))
  # Past the last doubling the exponent would overflow for very long runs.
  doublings = min(step // stage_steps, math.ceil(math.log2(s1 / s0)))
  return min(s1, s0 * 2**doublings) + 1


def sqrt_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """CM-v1's N(k), growing like the root of k (Song et al., 2023, app. C)."""
  squared = step / total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2
  return max(1, math.ceil(math.sqrt(squared) - 1)) + 1


def linear_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """N growing linearly in k: the published code's 'exponential' curriculum."""
  return math.floor(s0 + (s1 - s0) * step / total_steps) + 2


def fixed_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """N = s1 + 1 throughout, as in the published fine-tuning of BCM."""
  del step, total_steps, s0
  return s1 + 1


CURRICULA = {
    "doubling": doubling_scales,
    "sqrt": sqrt_scales,
    "linear": linear_scales,
    "fixed": fixed_scales,
}


def target_ema_rate(num_scales: int, mu0: float, s0: int) -> float:
  """CM-v1's mu(k) = exp(s0 ln(mu0) / N') with N' = N - 1 intervals.

  Song et al. (2023), appendix C: the target network lags less as the grid
  gets finer. mu0 = 0 is no lag at all (iCT).
  """
  if mu0 == 0.0:
    return 0.0
  return math.exp(s0 * math.log(mu0) / (num_scales - 1))


def ect_gap_ratio(step: int, stage_steps: int, q: float) -> float:
  """ECT's q^-(stage + 1), the gap (t - r) / t in the limit of large t."""
  return q ** -(step // stage_steps + 1)


def ect_earlier_time(
    t: jax.Array, gap_ratio: jax.Array, k: float = 8.0, b: float = 1.0
) -> jax.Array:
  """ECT's r(t) = t (1 - gap_ratio (1 + k sigmoid(-b t))), floored at 0.

  Geng et al. (2024), section 3.3; k = 0 is the constant mapping.
  """
  gap = gap_ratio * (1 + k * jax.nn.sigmoid(-b * t))
  return jnp.maximum(t * (1 - gap), 0.0)
