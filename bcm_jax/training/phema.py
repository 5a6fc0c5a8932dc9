"""Post-hoc EMA with power-function profiles, and EDM2's learning rate.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (EDM2, 2024), section 3 and appendix C. A power-function EMA at time t
weights the parameters of time s in [0, t] in proportion to s^gamma. Its length
is given by sigma_rel, the standard deviation of that profile relative to t; the
published runs track 0.05 and 0.10. A linear combination of stored averages
approximates an average of any other length, so that the length can be chosen
after training.

`beta`, `update` and the schedules run inside jit, in float32 or wider. The
reconstruction after training uses NumPy in float64, because its linear system
is ill-conditioned.

Only ratios of times matter, so times may have any unit. Use steps, or images as
floats: 2^31 images, EDM2's training budget, overflow an int32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.models import dtypes

Tree = Any
# sigma_rel of the uniform profile (gamma = 0), the longest average.
LARGEST_STD = 12**-0.5


def exp_to_std(exponent: np.ndarray | float) -> np.ndarray:
  """Returns sigma_rel of the profile s^gamma (EDM2, eq. 123).

  Args:
    exponent: gamma, any shape.

  Returns:
    The shape of exponent, float64.
  """
  g = np.asarray(exponent, np.float64)
  return np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def std_to_exp(std: np.ndarray | float) -> np.ndarray:
  """Returns gamma of the profile with a given sigma_rel (EDM2, eq. 126).

  Computes the largest root of g^3 + 7 g^2 + (16 - std^-2) g + 12 - std^-2.

  Args:
    std: sigma_rel, any shape.

  Returns:
    The shape of std, float64.

  Raises:
    UserError: not 0 < std < 12^(-1/2).
  """
  std = np.asarray(std, np.float64)
  wrong = std[~((std > 0) & (std < LARGEST_STD))]
  if wrong.size:
    raise errors.UserError(
        f"sigma_rel: got {wrong.flat[0]:g}, expected a value between 0 and "
        f"12^(-1/2) = {LARGEST_STD:.4f}; choose a smaller positive one"
    )

  def largest_root(s):
    roots = np.roots([1, 7, 16 - s**-2, 12 - s**-2])
    return roots.real[np.isreal(roots)].max()

  return np.reshape([largest_root(s) for s in std.ravel()], std.shape)


def _at_least_float32(x) -> jax.Array:
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(float)  # JAX would promote int64 to float32.
  return dtypes.at_least_float32(x)


def _log_beta(std, t_next, t_delta) -> jax.Array:
  """Returns ln beta; log1p is accurate for a small t_delta / t_next."""
  ratio = jnp.minimum(
      _at_least_float32(t_delta) / _at_least_float32(t_next), 1
  )
  return (std_to_exp(std) + 1).astype(ratio.dtype) * jnp.log1p(-ratio)


def beta(
    std: float, t_next: jax.Array | float, t_delta: jax.Array | float
) -> jax.Array:
  """Returns beta = (1 - t_delta / t_next)^(gamma + 1) (EDM2, eq. 127).

  The weight of the old average in an update. It is 0 in the first update, where
  t_delta = t_next.

  Args:
    std: sigma_rel of the profile, a number.
    t_next: time after the step.
    t_delta: duration of the step.

  Returns:
    The shape of t_next / t_delta, float32 or wider.

  Raises:
    UserError: sigma_rel out of range.
  """
  return jnp.exp(_log_beta(std, t_next, t_delta))


def update(
    average: Tree,
    params: Tree,
    std: float,
    t_next: jax.Array | float,
    t_delta: jax.Array | float,
) -> Tree:
  """Computes beta * average + (1 - beta) * params, in the average's dtype.

  Late in training 1 - beta is about 1e-5, which has only two correct digits if
  it is computed from a float32 beta; it is therefore computed by expm1.

  Args:
    average: tree of arrays; its initial value has no influence, see `beta`.
    params: tree of the same structure and shapes.
    std: sigma_rel of the profile, a number.
    t_next: time after the step.
    t_delta: duration of the step.

  Returns:
    The updated average.

  Raises:
    UserError: sigma_rel out of range.
  """
  one_minus_beta = -jnp.expm1(_log_beta(std, t_next, t_delta))

  def update_leaf(a, p):
    return a + one_minus_beta.astype(a.dtype) * (p.astype(a.dtype) - a)

  return jax.tree.map(update_leaf, average, params)


def halflife_beta(
    t_next: jax.Array | float,
    t_delta: jax.Array | float,
    halflife: float,
    ramp_up: float | None = 0.09,
) -> jax.Array:
  """Returns the decay rate of a traditional EMA with a half-life (EDM, EDM2).

  Args:
    t_next: time after the step, for example in images.
    t_delta: duration of the step.
    halflife: half-life in the same unit.
    ramp_up: the half-life is at most this fraction of t_next, so that an early
      average does not depend on the initialization (0.09 in EDM2, 0.05 in EDM);
      None disables it.

  Returns:
    The shape of t_next, float32 or wider; a rate for `ema.update`.
  """
  t_next, t_delta = _at_least_float32(t_next), _at_least_float32(t_delta)
  halflife = jnp.full_like(t_next, halflife)
  if ramp_up is not None:
    halflife = jnp.minimum(halflife, ramp_up * t_next)
  return 0.5 ** (t_delta / jnp.maximum(halflife, 1e-8))


def learning_rate(
    images: jax.Array | float,
    batch: int,
    peak: float = 0.01,
    reference_batches: float = 70_000,
    ramp_up_images: float = 10e6,
) -> jax.Array:
  """Returns EDM2's learning rate: linear warm-up, constant, then inverse sqrt.

  Args:
    images: images seen before the step; the rate of the first step is 0.
    batch: images per step.
    peak: reference rate (0.01 for EDM2-S; smaller for larger networks).
    reference_batches: steps after which the rate decays; 0 disables the decay.
    ramp_up_images: length of the warm-up in images; 0 disables it.

  Returns:
    The shape of images, float32 or wider.
  """
  images = _at_least_float32(images)
  rate = jnp.full_like(images, peak)
  if reference_batches:
    rate /= jnp.sqrt(jnp.maximum(images / (reference_batches * batch), 1))
  if ramp_up_images:
    rate *= jnp.minimum(images / ramp_up_images, 1)
  return rate


def response(time: int, std: float, length: int) -> np.ndarray:
  """Returns the weights of steps 0 .. length - 1 in an average (EDM2, sec. 3).

  Args:
    time: step of the average.
    std: sigma_rel of its profile.
    length: number of weights.

  Returns:
    [length] float64 in proportion to (k / time)^gamma, and 0 after `time`. The
    sum is 1 if length > time.
  """
  k = np.arange(max(length, time + 1))
  weights = np.where(k <= time, (k / time) ** std_to_exp(std), 0)
  return (weights / weights.sum())[:length]


def correlation(
    a_times: np.ndarray,
    a_stds: np.ndarray,
    b_times: np.ndarray,
    b_stds: np.ndarray,
) -> np.ndarray:
  """Computes inner products of averaging profiles (EDM2, appendix C).

  Args:
    a_times: [A] times of the first profiles.
    a_stds: [A] sigma_rel of the first profiles.
    b_times: [B] times of the second profiles.
    b_stds: [B] sigma_rel of the second profiles.

  Returns:
    [A, B] float64, integral over time of the product of the two densities, in
    1 / unit of time.

  Raises:
    UserError: sigma_rel out of range.
  """
  ta = np.asarray(a_times, np.float64)[:, None]
  tb = np.asarray(b_times, np.float64)[None, :]
  ga, gb = std_to_exp(a_stds)[:, None], std_to_exp(b_stds)[None, :]
  ratio = np.minimum(ta, tb) / np.maximum(ta, tb)
  overlap = ratio ** np.where(ta < tb, gb, ga)
  return (ga + 1) * (gb + 1) * overlap / ((ga + gb + 1) * np.maximum(ta, tb))


def solve_posthoc_coefficients(
    in_times: np.ndarray,
    in_stds: np.ndarray,
    out_times: np.ndarray,
    out_stds: np.ndarray,
) -> np.ndarray:
  """Solves for the coefficients of post-hoc EMA (EDM2, algorithm 3).

  Least squares between profiles, in float64. Each column is then scaled to sum
  1, as in the official code and unlike the paper, so that constant parameters
  are reproduced.

  Args:
    in_times: [A] times of the stored averages.
    in_stds: [A] sigma_rel of the stored averages.
    out_times: [B] times of the averages to reconstruct.
    out_stds: [B] sigma_rel of the averages to reconstruct.

  Returns:
    [A, B] float64 coefficients, of both signs.

  Raises:
    UserError: no stored average, one stored twice (its coefficient would be
      undefined), or times or sigma_rel out of range.
  """
  stored = list(zip(map(float, in_times), map(float, in_stds), strict=True))
  if not stored:
    raise errors.UserError(
        "stored averages: got 0, expected 1 or more; train with "
        "training.ema_stds"
    )
  if min(min(in_times), min(out_times)) <= 0:
    raise errors.UserError(
        "time of an average: got 0, expected a positive time; remove it"
    )
  duplicates = sorted({x for x in stored if stored.count(x) > 1})
  if duplicates:
    time, std = duplicates[0]
    raise errors.UserError(
        f"stored averages: got two at time {time:g} with sigma_rel {std:g}, "
        "expected one; remove one"
    )
  gram = correlation(in_times, in_stds, in_times, in_stds)
  target = correlation(in_times, in_stds, out_times, out_stds)
  x = np.linalg.solve(gram, target)
  return x / x.sum(axis=0)


def coefficients(
    times: Sequence[float], stds: Sequence[float], time: float, std: float
) -> np.ndarray:
  """Returns the coefficients of all snapshots for one post-hoc average.

  Snapshots at time 0 (initial parameters) and after `time` get 0.

  Args:
    times: [A] times of the stored averages.
    stds: [A] sigma_rel of the stored averages.
    time: time of the average to reconstruct, one of `times`.
    std: sigma_rel of the average to reconstruct.

  Returns:
    [A] float64 coefficients of sum 1 for `reconstruct`.

  Raises:
    UserError: no snapshot at that time, or an error of
      `solve_posthoc_coefficients`.
  """
  times, stds = np.asarray(times, np.float64), np.asarray(stds, np.float64)
  if time <= 0 or time not in times:
    choices = ", ".join(f"{t:g}" for t in np.unique(times[times > 0]))
    raise errors.UserError(
        f"time of the average: got {time:g}, expected that of a snapshot "
        f"({choices or 'no snapshots'}); choose one of these"
    )
  used = (times > 0) & (times <= time)
  result = np.zeros(len(times))
  result[used] = solve_posthoc_coefficients(
      times[used], stds[used], [time], [std]
  )[:, 0]
  return result


def reconstruct(trees: Iterable[Tree], weights: Sequence[float]) -> Tree:
  """Computes sum_i weights[i] trees[i], in float32 or wider.

  Sums differences from the first tree: rounding errors of large weights of both
  signs are then smaller, and with weights of sum 1 a float32 value that is the
  same in all trees is reproduced bit for bit.

  Args:
    trees: one tree per weight. A generator keeps at most two trees in memory.
      Trees of weight 0 are skipped.
    weights: coefficients, see `coefficients`.

  Returns:
    A tree of NumPy arrays.

  Raises:
    UserError: the numbers of trees and weights differ, or all weights are 0.
  """
  weights = np.asarray(weights, np.float64)
  weight_sum, base, total, count = weights.sum(), None, None, 0
  for count, tree in enumerate(trees, 1):
    if count > len(weights) or weights[count - 1] == 0:
      continue
    tree = jax.tree.map(_host, tree)
    if base is None:
      base = tree
      total = jax.tree.map(lambda v: v * v.dtype.type(weight_sum), tree)
      continue
    weight = weights[count - 1]
    total = jax.tree.map(
        lambda s, v, b, w=weight: s + v.dtype.type(w) * (v - b),
        total, tree, base,
    )
  if count != len(weights) or total is None:
    raise errors.UserError(
        f"snapshots: got {count} for {len(weights)} weights, "
        f"{np.count_nonzero(weights)} of them not 0, expected one per weight; "
        "pass each snapshot once"
    )
  return jax.tree.map(np.asarray, total)


def _host(leaf) -> np.ndarray:
  leaf = np.asarray(leaf)
  return leaf.astype(np.promote_types(np.float32, leaf.dtype))
