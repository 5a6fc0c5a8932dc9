"""Power-function averages, chosen after training, and EDM2's learning rate.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (EDM2, 2024), section 3 and appendix C. An average at time t weighs the
parameters of time s by s^gamma on [0, t]. Its length is told by sigma_rel, the
standard deviation of that profile as a fraction of t: 0.05 and 0.10 are what
the published runs track. A weighted sum of stored averages then comes close to
an average of any other length, so that the length is chosen when training is
over.

What training calls works inside jit, in float32 or wider. What happens after
training is NumPy in float64, for the system to solve is ill-conditioned.

Times may be counted in any unit, as only their ratios matter. Count steps, or
images as floats: 2^31 images, EDM2's own budget, overflow an int32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.models import dtypes

Tree = Any
# Of a uniform profile, gamma = 0; longer averages do not exist.
LARGEST_STD = 12**-0.5


def exp_to_std(exponent: np.ndarray | float) -> np.ndarray:
  """sigma_rel of the profile s^gamma (eq. 123), in float64."""
  g = np.asarray(exponent, np.float64)
  return np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def std_to_exp(std: np.ndarray | float) -> np.ndarray:
  """gamma of the profile of a given sigma_rel (eq. 126), in float64.

  The largest root of g^3 + 7 g^2 + (16 - std^-2) g + 12 - std^-2.

  Args:
    std: any shape.

  Raises:
    UserError: outside 0 < std < 12^(-1/2).
  """
  std = np.asarray(std, np.float64)
  wrong = std[~((std > 0) & (std < LARGEST_STD))]
  if wrong.size:
    raise errors.UserError(
        f"sigma_rel = {wrong.flat[0]:g} is no length of a power-function "
        f"average; choose one above 0 and below 12^(-1/2) = {LARGEST_STD:.4f}"
    )

  def one(s):
    roots = np.roots([1, 7, 16 - s**-2, 12 - s**-2])
    return roots.real[np.isreal(roots)].max()

  return np.reshape([one(s) for s in std.ravel()], std.shape)


def _wide(x) -> jax.Array:
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(float)  # JAX would promote int64 to float32.
  return dtypes.at_least_float32(x)


def _log_beta(std, t_next, t_delta) -> jax.Array:
  """ln beta; log1p keeps the digits of a small t_delta / t_next."""
  part = jnp.minimum(_wide(t_delta) / _wide(t_next), 1)
  return (std_to_exp(std) + 1).astype(part.dtype) * jnp.log1p(-part)


def beta(
    std: float, t_next: jax.Array | float, t_delta: jax.Array | float
) -> jax.Array:
  """Returns the decay of an update: (1 - t_delta/t_next)^(gamma + 1).

  Eq. 127. The first update keeps nothing: the start is forgotten.

  Args:
    std: sigma_rel of the profile, a number.
    t_next: time after the step that is averaged in.
    t_delta: duration of that step.

  Returns:
    The shape of t_next / t_delta, float32 or wider.

  Raises:
    UserError: for a sigma_rel out of range.
  """
  return jnp.exp(_log_beta(std, t_next, t_delta))


def update(
    average: Tree,
    params: Tree,
    std: float,
    t_next: jax.Array | float,
    t_delta: jax.Array | float,
) -> Tree:
  """beta * average + (1 - beta) * params, in the averages' own dtype.

  Late in training 1 - beta is about 1e-5, of which `beta` in float32 leaves
  two digits; here it is computed without that subtraction.

  Args:
    average, params: trees of one structure; the average's start is forgotten.
    std, t_next, t_delta: as in `beta`.
  """
  new = -jnp.expm1(_log_beta(std, t_next, t_delta))

  def one(a, p):
    return a + new.astype(a.dtype) * (p.astype(a.dtype) - a)

  return jax.tree.map(one, average, params)


def halflife_beta(
    t_next: jax.Array | float,
    t_delta: jax.Array | float,
    halflife: float,
    ramp_up: float | None = 0.09,
) -> jax.Array:
  """Returns the decay of an update of an ordinary exponential average.

  Args:
    t_next: time after the step that is averaged in, such as images seen.
    t_delta: duration of that step.
    halflife: half-life in the same unit.
    ramp_up: the half-life is at most this fraction of t_next, so that an early
      average forgets the start (0.09 in EDM2, 0.05 in EDM); None does without.

  Returns:
    The shape of t_next, float32 or wider; a rate for `ema.update`.
  """
  t_next, t_delta = _wide(t_next), _wide(t_delta)
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
  """EDM2's rate: a linear rise, flat, then 1 / sqrt(time).

  Args:
    images: images seen before the step; the first step's rate is 0.
    batch: images per step.
    peak: reference rate (0.01 for EDM2-S; smaller for larger networks).
    reference_batches: steps after which the rate decays; 0 never decays.
    ramp_up_images: images of the rise; 0 is none.

  Returns:
    The shape of images, float32 or wider.
  """
  images = _wide(images)
  rate = jnp.full_like(images, peak)
  if reference_batches:
    rate /= jnp.sqrt(jnp.maximum(images / (reference_batches * batch), 1))
  if ramp_up_images:
    rate *= jnp.minimum(images / ramp_up_images, 1)
  return rate


def response(time: int, std: float, length: int) -> np.ndarray:
  """Weights that an average at a time gives to steps 0 .. length - 1.

  Returns:
    [length] in float64, of sum 1 if length > time: (k / time)^gamma scaled,
    and 0 after `time`.
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
  """Inner products of profiles as functions of time (appendix C.5).

  Args:
    a_times, a_stds: [A] times and sigma_rel of the first profiles.
    b_times, b_stds: [B] those of the second.

  Returns:
    [A, B] integrals of the products of densities, in 1 / unit of time.

  Raises:
    UserError: for a sigma_rel out of range.
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
  """Weights of stored averages that come nearest to others (algorithm 3).

  Least squares between profiles, in float64. Columns are scaled to sum 1 then,
  as the official code does and the paper does not, so that parameters that
  never moved are reproduced.

  Args:
    in_times, in_stds: [A] times and sigma_rel of the stored averages.
    out_times, out_stds: [B] those that are wanted.

  Returns:
    [A, B] coefficients, of both signs.

  Raises:
    UserError: for an average stored twice, which leaves its share undefined,
      and for times and sigma_rel out of range.
  """
  stored = list(zip(map(float, in_times), map(float, in_stds), strict=True))
  if not stored:
    raise errors.UserError("no stored averages to reconstruct others from")
  if min(min(in_times), min(out_times)) <= 0:
    raise errors.UserError("an average at time 0 has no profile; leave it out")
  twice = sorted({each for each in stored if stored.count(each) > 1})
  if twice:
    time, std = twice[0]
    raise errors.UserError(
        f"the average at time {time:g} with sigma_rel {std:g} is listed twice; "
        "give each once"
    )
  gram = correlation(in_times, in_stds, in_times, in_stds)
  target = correlation(in_times, in_stds, out_times, out_stds)
  x = np.linalg.solve(gram, target)
  return x / x.sum(axis=0)


def coefficients(
    times: Sequence[float], stds: Sequence[float], time: float, std: float
) -> np.ndarray:
  """Weights of all snapshots for one average at the time of a snapshot.

  Snapshots at time 0 (bare parameters) and after `time` get 0.

  Args:
    times, stds: [A] times and sigma_rel of the stored averages.
    time: time of the average that is wanted; one of `times`.
    std: its sigma_rel.

  Returns:
    [A] float64 coefficients of sum 1 for `reconstruct`.

  Raises:
    UserError: where no snapshot is of that time, and as
      `solve_posthoc_coefficients`.
  """
  times, stds = np.asarray(times, np.float64), np.asarray(stds, np.float64)
  if time <= 0 or time not in times:
    known = ", ".join(f"{t:g}" for t in np.unique(times[times > 0]))
    raise errors.UserError(
        f"no snapshot of time {time:g} to end an average at "
        f"(snapshots: {known or 'none'}); choose one of these"
    )
  used = (times > 0) & (times <= time)
  result = np.zeros(len(times))
  result[used] = solve_posthoc_coefficients(
      times[used], stds[used], [time], [std]
  )[:, 0]
  return result


def reconstruct(trees: Iterable[Tree], weights: Sequence[float]) -> Tree:
  """sum_i weights[i] trees[i], accumulated in float32 or wider.

  Sums differences from the first tree: large weights of both signs then lose
  fewer digits, and under weights of sum 1 float32 numbers that are the same in
  all trees stay the same to the last bit.

  Args:
    trees: as many trees as weights; a generator that reads one at a time keeps
      only two in memory. Trees of weight 0 are passed over.
    weights: such as `coefficients`.

  Returns:
    A tree of NumPy arrays.

  Raises:
    UserError: if there are more or fewer trees than weights.
  """
  weights = np.asarray(weights, np.float64)
  whole, base, total, count = weights.sum(), None, None, 0
  for count, tree in enumerate(trees, 1):
    if count > len(weights) or weights[count - 1] == 0:
      continue
    tree = jax.tree.map(_host, tree)
    if base is None:
      base = tree
      total = jax.tree.map(lambda v: v * v.dtype.type(whole), tree)
      continue
    weight = weights[count - 1]
    total = jax.tree.map(
        lambda s, v, b, w=weight: s + v.dtype.type(w) * (v - b),
        total, tree, base,
    )
  if count != len(weights) or total is None:
    raise errors.UserError(
        f"{count} snapshots for {len(weights)} weights "
        f"({np.count_nonzero(weights)} not 0); give one snapshot a weight"
    )
  return jax.tree.map(np.asarray, total)


def _host(leaf) -> np.ndarray:
  leaf = np.asarray(leaf)
  return leaf.astype(np.promote_types(np.float32, leaf.dtype))
