"""How good a set of samples is: every number that its features allow."""

from typing import NamedTuple

import numpy as np

from bcm_jax.metrics import feature_extractors
from bcm_jax.metrics import fid
from bcm_jax.metrics import inception_score
from bcm_jax.metrics import kid
from bcm_jax.metrics import moments
from bcm_jax.metrics import precision_recall
from bcm_jax.metrics import reference_stats

# Subsets of the kernel distance (Binkowski et al., 2018).
_SUBSET = 1000


class Target(NamedTuple):
  """What samples are compared with.

  Attributes:
    reference: statistics of the real images.
    real: pooled features [m, D] of real images, for the numbers that compare
      images one by one; None where there are statistics alone.
  """

  reference: reference_stats.Reference
  real: np.ndarray | None


def sample_quality(
    activations: feature_extractors.Activations,
    distance: str,
    target: Target,
    k: int = 3,
) -> dict[str, float]:
  """Numbers of a set of samples.

  Args:
    activations: of the samples, pooled [n, D].
    distance: name of the Frechet distance on these features.
    target: real images, in the same features.
    k: neighbours of precision, recall, density and coverage.

  Returns:
    The Frechet distance under its name; sFID where both sides have spatial
    features; KID, precision, recall, density and coverage where there are real
    images; the Inception score (IS) where the features give probabilities.
  """
  reference = target.reference
  numbers = {
      distance: fid.frechet_distance(
          moments.from_features(activations.pooled).gaussian(),
          reference.pooled,
      )
  }
  if activations.spatial is not None and reference.spatial is not None:
    numbers["sFID"] = fid.frechet_distance(
        moments.from_features(activations.spatial).gaussian(),
        reference.spatial,
    )
  if target.real is not None:
    size = min(_SUBSET, len(activations.pooled), len(target.real))
    numbers["KID"], _ = kid.kernel_distance(
        target.real, activations.pooled, subset_size=size
    )
    numbers |= precision_recall.prdc(
        target.real, activations.pooled, k
    )._asdict()
  if activations.probabilities is not None:
    numbers["IS"] = inception_score.inception_score(
        activations.probabilities
    ).mean
  return {name: float(value) for name, value in numbers.items()}


def spread(values: list[float | None]) -> dict[str, float | None]:
  """Mean of a number over seeds, and its standard deviation (n - 1).

  None, which stands for a number that is not finite, makes both None.
  """
  if None in values:
    return {"mean": None, "std": None}
  return {
      "mean": float(np.mean(values)),
      "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
  }
