"""Frechet distance of two Gaussians, the last step of FID.

Dowson and Landau 1982: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace
of the root is the sum of the singular values of A1^T A2 for any factors
S = A A^T. Evaluators take a matrix root of S1 S2, which has none where a
covariance is singular, or roots of eigenvalues, where rounding of 1e-16 grows
to 1e-8; singular values keep their digits, and are the same for both orders.
"""

import numpy as np
import scipy.linalg

from bcm_jax.errors import UserError
from bcm_jax.metrics.moments import Gaussian

# Of the largest entry or eigenvalue: what float32 statistics of other tools
# may be off by is far below, what is no covariance far above.
_NOT_A_COVARIANCE = 1e-3


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
  """The squared 2-Wasserstein distance of two Gaussians, in float64.

  Args:
    a: (mean [D], covariance [D, D]). Singular ones are welcome, such as those
      of fewer images than features: directions without variance (below
      D eps of the largest eigenvalue) count as having none.
    b: the same for the other set.

  Returns:
    A number >= 0, in squared units of the features; the same for (b, a) to
    the last bits. The part of the covariances is never below 0; where
    rounding puts it there, for equal ones, it is cut to 0.

  Raises:
    UserError: shapes that do not fit, NaN, or matrices that are no
      covariances.
  """
  (mean_a, cov_a), (mean_b, cov_b) = _checked("a", a), _checked("b", b)
  if mean_a.shape != mean_b.shape:
    raise UserError(
      f"the Gaussians have {len(mean_a)} and {len(mean_b)} dimensions, "
      "expected the same: use statistics of the same features"
    )
  roots = _factor("a", cov_a).T @ _factor("b", cov_b)
  trace_of_root = np.sum(
    scipy.linalg.svdvals(roots, overwrite_a=True, check_finite=False)
  )
  traces = np.trace(cov_a) + np.trace(cov_b)
  shift = mean_a - mean_b
  return float(shift @ shift + max(0.0, traces - 2.0 * trace_of_root))


def _checked(name: str, gaussian: Gaussian) -> Gaussian:
  """As float64, of shapes that fit, finite and symmetric."""
  mean, covariance = (np.asarray(part, np.float64) for part in gaussian)
  if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
    raise UserError(
      f"Gaussian {name} has a mean of shape {mean.shape} and a covariance of "
      f"shape {covariance.shape}, expected [D] and [D, D]: pass (mean, "
      "covariance)"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(
      f"Gaussian {name} holds NaN or infinity, expected finite numbers: make "
      "the statistics anew"
    )
  asymmetry = np.max(np.abs(covariance - covariance.T))
  if asymmetry > _NOT_A_COVARIANCE * np.max(np.abs(covariance)):
    raise UserError(
      f"the covariance of {name} differs from its transpose by "
      f"{asymmetry:.3g}, expected a symmetric one: make the statistics anew"
    )
  return Gaussian(mean, (covariance + covariance.T) / 2)


def _factor(name: str, covariance: np.ndarray) -> np.ndarray:
  """A [D, rank] with A A^T = covariance."""
  # 'evd' is the fastest driver at 2048 for all eigenvectors.
  values, vectors = scipy.linalg.eigh(
    covariance, driver="evd", check_finite=False
  )
  if values[0] < -_NOT_A_COVARIANCE * abs(values[-1]):
    raise UserError(
      f"the covariance of {name} has the eigenvalue {values[0]:.3g}, expected "
      "none below 0: make the statistics anew"
    )
  kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
  return vectors[:, kept] * np.sqrt(values[kept])
