"""Frechet distance between two Gaussians, the last step of FID.

Dowson and Landau (1982): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace
of the matrix root is the sum of the singular values of A1^T A2 for any factors
S = A A^T. Other evaluators take scipy's sqrtm of S1 S2, which does not exist in
general for singular covariances, or square roots of eigenvalues, where a
rounding error of 1e-16 grows to 1e-8. Singular values avoid both problems and
are symmetric in the two sets.
"""

import numpy as np
import scipy.linalg

from bcm_jax.errors import UserError
from bcm_jax.metrics.moments import Gaussian

# Tolerance for asymmetry and negative eigenvalues, relative to the largest
# entry or eigenvalue. Rounding of float32 statistics is far smaller.
COVARIANCE_TOLERANCE = 1e-3


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
  """Computes the squared 2-Wasserstein distance of two Gaussians in float64.

  Args:
    a: (mean [D], covariance [D, D]). Covariances may be singular, for example
      those of fewer than D images: eigenvalues below D eps times the largest
      one count as 0.
    b: Gaussian of the other set, of the same D.

  Returns:
    Distance >= 0, in squared units of the features; symmetric in a and b up to
    the last bits. The covariance term is clipped at 0.

  Raises:
    UserError: wrong shapes, non-finite values, or a matrix that is not a
      covariance.
  """
  (mean_a, cov_a), (mean_b, cov_b) = _checked("a", a), _checked("b", b)
  if mean_a.shape != mean_b.shape:
    raise UserError(
      f"Gaussians: got {len(mean_a)} and {len(mean_b)} dimensions, expected "
      "the same; use statistics of the same features"
    )
  roots = _factor("a", cov_a).T @ _factor("b", cov_b)
  trace_of_root = np.sum(
    scipy.linalg.svdvals(roots, overwrite_a=True, check_finite=False)
  )
  traces = np.trace(cov_a) + np.trace(cov_b)
  shift = mean_a - mean_b
  return float(shift @ shift + max(0.0, traces - 2.0 * trace_of_root))


def _checked(name: str, gaussian: Gaussian) -> Gaussian:
  """Converts to float64; checks shapes, finiteness and symmetry."""
  mean, covariance = (np.asarray(part, np.float64) for part in gaussian)
  if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
    raise UserError(
      f"Gaussian {name}: got mean of shape {mean.shape} and covariance of "
      f"shape {covariance.shape}, expected [D] and [D, D]; pass (mean, "
      "covariance)"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(
      f"Gaussian {name}: got NaN or infinity, expected finite numbers; "
      "recompute the statistics"
    )
  asymmetry = np.max(np.abs(covariance - covariance.T))
  if asymmetry > COVARIANCE_TOLERANCE * np.max(np.abs(covariance)):
    raise UserError(
      f"Gaussian {name}: covariance differs from its transpose by "
      f"{asymmetry:.3g}, expected a symmetric matrix; recompute the statistics"
    )
  return Gaussian(mean, (covariance + covariance.T) / 2)


def _factor(name: str, covariance: np.ndarray) -> np.ndarray:
  """Returns A [D, rank] with A A^T = covariance."""
  # 'evd' is the fastest driver for all eigenvectors at D = 2048.
  values, vectors = scipy.linalg.eigh(
    covariance, driver="evd", check_finite=False
  )
  if values[0] < -COVARIANCE_TOLERANCE * abs(values[-1]):
    raise UserError(
      f"Gaussian {name}: covariance has the eigenvalue {values[0]:.3g}, "
      "expected >= 0; recompute the statistics"
    )
  kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
  return vectors[:, kept] * np.sqrt(values[kept])
