"""Inception score.

Salimans et al. 2016, "Improved Techniques for Training GANs"
(arXiv:1606.03498), section 4, with the splits of the ADM evaluator.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from bcm_jax.errors import UserError

# Larger than the rounding error of a half precision softmax, small enough to
# detect logits.
_SUM_TOLERANCE = 1e-2


class Score(NamedTuple):
  """Mean and standard deviation over splits; scores are in [1, K] for K
  classes."""

  mean: float
  std: float


def inception_score(
  probabilities: np.ndarray, split_size: int = 5000
) -> Score:
  """Computes exp(E_x KL(p(y|x) || p(y))) over splits of the samples.

  A smaller split gives a lower score, because its mean p(y) is nearer to each
  p(y|x): compare only scores of the same split size. If n is not a multiple of
  `split_size`, the remaining samples form a smaller split of their own.

  Args:
    probabilities: [n, K], p(y|x) of each sample.
    split_size: samples per split.

  Raises:
    UserError: no rows, rows that are not probabilities, or split_size < 1.
  """
  p = _checked(probabilities)
  if split_size < 1:
    raise UserError(
      f"split_size: got {split_size}, expected 1 or more; 5000 is usual"
    )
  splits = (p[i : i + split_size] for i in range(0, len(p), split_size))
  scores = [
    np.exp(np.mean(np.sum(scipy.special.rel_entr(s, s.mean(axis=0)), axis=1)))
    for s in splits
  ]
  return Score(float(np.mean(scores)), float(np.std(scores)))


def _checked(probabilities: np.ndarray) -> np.ndarray:
  p = np.asarray(probabilities, np.float64)
  if p.ndim != 2 or p.size == 0:
    raise UserError(
      f"probabilities: got shape {p.shape}, expected [n, K] with n >= 1; "
      "pass one row per image"
    )
  good = np.abs(p.sum(axis=1) - 1.0) <= _SUM_TOLERANCE
  good &= (p >= 0).all(axis=1)
  if not good.all():
    row = int(np.argmin(good))
    raise UserError(
      f"probabilities: row {row} has minimum {p[row].min():.3g} and sum "
      f"{p[row].sum():.3g}, expected >= 0 and 1; pass a softmax, not logits"
    )
  return p
