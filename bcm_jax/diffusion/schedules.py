"""Discretization of noise levels, time distributions and curricula.

Tables are computed on the host in float64, padded to a length that does not
depend on N, and passed to the compiled step as float32 arguments, so that a
change of N does not recompile.
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
  """Computes ascending noise levels (Karras et al., 2022, eq. 5).

  Returns:
    float64 [num_scales] from sigma_min to sigma_max.
  """
  ramp = np.linspace(0, 1, num_scales, dtype=np.float64)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  sigmas = (low + ramp * (high - low)) ** rho
  sigmas[0], sigmas[-1] = sigma_min, sigma_max
  return sigmas


def lognormal_bins(
    sigmas: np.ndarray, p_mean: float = -1.1, p_std: float = 2.0
) -> np.ndarray:
  """Computes the discretized log-normal of iCT (Song & Dhariwal, 2023, eq. 10).

  The probability of each interval of the grid `sigmas` under ln sigma ~
  N(p_mean, p_std^2), normalized.

  Returns:
    float64 [len(sigmas) - 1], sums to 1.
  """
  edges = special.erf((np.log(sigmas) - p_mean) / (math.sqrt(2) * p_std))
  mass = np.diff(edges)
  return mass / mass.sum()


def uniform_bins(sigmas: np.ndarray) -> np.ndarray:
  """Returns equal probabilities of all intervals (CM; Song et al., 2023)."""
  return np.full(len(sigmas) - 1, 1 / (len(sigmas) - 1))


class GridTables(NamedTuple):
  """Grid of N levels, padded to a length L that does not depend on N.

  Attributes:
    sigmas: [L] ascending levels; entries from index N on repeat the last level.
    cdf: [L] cumulative distribution of the start index i + 1 (t = sigmas[i+1],
      t2 = sigmas[i]): cdf[k] = P(start index <= k), so cdf[0] = 0.
    end_cdf: [L] cumulative distribution of the end index.
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
  """Computes the float32 tables of one N with float64 arithmetic.

  Args:
    num_scales: N, the number of levels.
    length: L >= N, the length of the padded tables.
    sigma_min, sigma_max, rho: see `karras_sigmas`.
    time_distribution: distribution of the interval, 'lognormal' or 'uniform'.
    p_mean, p_std: see `lognormal_bins`.
    include_T: include sigma_max in the start and end levels. End levels are
      left edges of intervals; with include_T, sigma_max has the weight of the
      last interval too. False omits the last interval as in the official BCM
      code, where the largest trained level is sigmas[N - 2] (45.3 for N = 11).

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
  """Samples indices by inverting a cumulative distribution [L].

  Args:
    cdf: [L] cumulative probabilities.
    uniform: uniform samples in [0, 1), any shape.

  Returns:
    int32 indices of the same shape.
  """
  # `sample_other_index` can pass 1 after rounding, which no entry exceeds.
  uniform = jnp.minimum(uniform, 1 - jnp.finfo(uniform.dtype).epsneg)
  index = jnp.searchsorted(cdf, uniform, side="right")
  return jnp.minimum(index, cdf.shape[0] - 1).astype(jnp.int32)


def sample_other_index(
    cdf: jax.Array, excluded: jax.Array, uniform: jax.Array
) -> jax.Array:
  """Samples an index conditioned on not being `excluded`.

  Inverts the distribution without the mass of the excluded index: samples above
  its lower edge are shifted by its mass.

  Args:
    cdf: [L] cumulative probabilities.
    excluded: int32 scalar or array.
    uniform: uniform samples in [0, 1) of the same shape.

  Returns:
    int32 indices of the same shape, never equal to `excluded`.
  """
  below = jnp.where(excluded > 0, cdf[jnp.maximum(excluded - 1, 0)], 0.0)
  mass = cdf[excluded] - below
  r = uniform * (1 - mass)
  index = sample_index(cdf, jnp.where(r >= below, r + mass, r))
  # Rounding can return the excluded index itself; take its neighbor then.
  step = jnp.where(excluded > 0, -1, 1)
  return jnp.where(index == excluded, excluded + step, index)


def doubling_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """iCT's curriculum N(k) = min(s1, s0 2^floor(k / K')) + 1.

  K' = floor(K / (log2(s1 / s0) + 1)) steps per stage (Song & Dhariwal, 2023,
  section 3.4).

  Args:
    step: k.
    total_steps: K.
    s0, s1: number of intervals at the start and at the end.
  """
  stage_steps = max(1, math.floor(total_steps / (math.log2(s1 / s0) + 1)))
  # Limit the exponent, which would overflow in very long runs.
  doublings = min(step // stage_steps, math.ceil(math.log2(s1 / s0)))
  return min(s1, s0 * 2**doublings) + 1


def sqrt_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """CM's curriculum: N(k) grows with sqrt(k) (Song et al., 2023, app. C)."""
  squared = step / total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2
  return max(1, math.ceil(math.sqrt(squared) - 1)) + 1


def linear_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """Linear growth of N(k); called 'exponential' in the official BCM code."""
  return math.floor(s0 + (s1 - s0) * step / total_steps) + 2


def fixed_scales(step: int, total_steps: int, s0: int, s1: int) -> int:
  """Constant N = s1 + 1, used for BCM fine-tuning (Li & He, 2024)."""
  del step, total_steps, s0
  return s1 + 1


CURRICULA = {
    "doubling": doubling_scales,
    "sqrt": sqrt_scales,
    "linear": linear_scales,
    "fixed": fixed_scales,
}


def target_ema_rate(num_scales: int, mu0: float, s0: int) -> float:
  """CM's target EMA rate mu(k) = exp(s0 ln(mu0) / N') with N' = N - 1.

  Song et al. (2023), appendix C: the rate approaches 1 as the grid is refined.
  mu0 = 0 uses the online network as the target (iCT).
  """
  if mu0 == 0.0:
    return 0.0
  return math.exp(s0 * math.log(mu0) / (num_scales - 1))


def ect_gap_ratio(step: int, stage_steps: int, q: float) -> float:
  """ECT's q^-(stage + 1): the limit of (t - r) / t for large t."""
  return q ** -(step // stage_steps + 1)


def ect_earlier_time(
    t: jax.Array, gap_ratio: jax.Array, k: float = 8.0, b: float = 1.0
) -> jax.Array:
  """ECT's mapping r(t) = t (1 - gap_ratio (1 + k sigmoid(-b t))), r >= 0.

  Geng et al. (2024), section 3.3; k = 0 gives the constant mapping.

  Args:
    t: [B] noise levels.
    gap_ratio: see `ect_gap_ratio`.
    k, b: constants of the sigmoid mapping.

  Returns:
    [B] levels r.
  """
  gap = gap_ratio * (1 + k * jax.nn.sigmoid(-b * t))
  return jnp.maximum(t * (1 - gap), 0.0)
