"""All metrics of a set of samples, computed from its features."""

from typing import NamedTuple

import numpy as np

from bcm_jax.metrics import feature_extractors
from bcm_jax.metrics import fid
from bcm_jax.metrics import inception_score
from bcm_jax.metrics import kid
from bcm_jax.metrics import moments
from bcm_jax.metrics import precision_recall
from bcm_jax.metrics import reference_stats

# Subset size of KID (Binkowski et al., 2018).
_SUBSET = 1000


class Target(NamedTuple):
  """Real images that samples are compared with.

  Attributes:
    reference: statistics of the real images.
    real: pooled features [m, D] of real images, for KID, precision, recall,
      density and coverage; None if only statistics are available.
  """

  reference: reference_stats.Reference
  real: np.ndarray | None


def sample_quality(
    activations: feature_extractors.Activations,
    distance: str,
    target: Target,
    k: int = 3,
) -> dict[str, float]:
  """Computes all metrics of a set of samples that its features allow.

  Args:
    activations: features of the samples, pooled [n, D].
    distance: name of the Frechet distance on these features.
    target: real images, in the same features.
    k: neighbors of precision and recall.

  Returns:
    The Frechet distance under its name; sFID if both sides have spatial
    features; KID, precision, recall, density and coverage if features of real
    images are given; the Inception score (IS) if the features have class
    probabilities.
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
  """Returns the mean over seeds and the sample standard deviation (n - 1).

  None means a value that is not finite; both results are then None.
  """
  if None in values:
    return {"mean": None, "std": None}
  return {
      "mean": float(np.mean(values)),
      "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
  }
