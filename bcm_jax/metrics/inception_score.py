"""Inception score.

Salimans et al. 2016, "Improved Techniques for Training GANs"
(arXiv:1606.03498), section 4, with the splits of the ADM evaluator.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from bcm_jax.errors import UserError

# Far above what float32 or half precision softmax is off by, far below what
# logits sum to.
_SUM_TOLERANCE = 1e-2


class Score(NamedTuple):
  """Mean and standard deviation over splits, in [1, K] for K classes."""

  mean: float
  std: float


def inception_score(
  probabilities: np.ndarray, split_size: int = 5000
) -> Score:
  """exp of the mean divergence of p(y|x) from the mean p(y), over splits.

  A small split has a small score, as its mean p(y) is near each p(y|x):
  compare only numbers of one split size, and take a multiple of it as n, or
  the images that are left over count as a split of their own.

  Args:
    probabilities: [n, K] of the classes given each image, in file order.
    split_size: images a split.

  Raises:
    UserError: no rows, rows that are no probabilities, or no split size.
  """
  p = _checked(probabilities)
  if split_size < 1:
    raise UserError(
      f"split_size is {split_size}, expected 1 or more: 5000 is usual"
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
      f"probabilities have shape {p.shape}, expected [n, K] with n >= 1: "
      "pass one row an image"
    )
  good = np.abs(p.sum(axis=1) - 1.0) <= _SUM_TOLERANCE
  good &= (p >= 0).all(axis=1)
  if not good.all():
    row = int(np.argmin(good))
    raise UserError(
      f"row {row} of the probabilities has least value {p[row].min():.3g} and "
      f"sum {p[row].sum():.3g}, expected >= 0 and 1: pass a softmax, not logits"
    )
  return p
