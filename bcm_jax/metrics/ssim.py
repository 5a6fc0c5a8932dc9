"""Structural similarity (SSIM) of pairs of images.

Wang et al. (2004), "Image Quality Assessment: From Error Visibility to
Structural Similarity", equations 13-17: local means, variances and covariance
under an 11 x 11 Gaussian window of standard deviation 1.5, K1 = 0.01,
K2 = 0.03, range 255, averaged over all windows inside the image. The paper is
for gray images; for RGB the SSIM of the channels is averaged, as in
scikit-image.
"""

import numpy as np
import scipy.ndimage

from bcm_jax.errors import UserError
from bcm_jax.metrics.reconstruction import pairs

WINDOW = 11
_RADIUS = WINDOW // 2
_SIGMA = 1.5
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2
# Images converted to float64 at a time; each needs five maps of its size.
_BLOCK_SIZE = 64


def structural_similarity(
  original_uint8: np.ndarray, reconstruction_uint8: np.ndarray
) -> np.ndarray:
  """Computes the mean SSIM of each pair of images.

  Args:
    original_uint8: uint8 [n, H, W, C], n >= 1, H and W of 11 or more.
    reconstruction_uint8: uint8 [n, H, W, C].

  Returns:
    float64 [n] in [-1, 1]; 1 for equal images.

  Raises:
    UserError: wrong dtypes or shapes, or images smaller than the window.
  """
  original, reconstruction = pairs(original_uint8, reconstruction_uint8)
  if original.ndim != 4:
    raise UserError(
      f"images: got shape {original.shape}, expected [n, H, W, C]; pass a batch"
    )
  _, height, width, _ = original.shape
  if min(height, width) < WINDOW:
    raise UserError(
      f"images: got {height} x {width} pixels, expected {WINDOW} x {WINDOW} or "
      "more for the window of SSIM; use the MSE for smaller images"
    )
  starts = range(0, len(original), _BLOCK_SIZE)
  parts = (slice(start, start + _BLOCK_SIZE) for start in starts)
  similarities = [
    _similarity(original[part], reconstruction[part]) for part in parts
  ]
  return np.concatenate(similarities)


def _local_mean(images: np.ndarray) -> np.ndarray:
  """Gaussian-weighted means of all complete windows, [n, H - 10, W - 10, C]."""
  for axis in (1, 2):
    images = scipy.ndimage.gaussian_filter1d(
      images, _SIGMA, axis, radius=_RADIUS
    )
  inside = slice(_RADIUS, -_RADIUS)
  return images[:, inside, inside]


def _similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """SSIM (equation 13), averaged over windows and channels, [n]."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  mean_x, mean_y = _local_mean(x), _local_mean(y)
  variance_x = _local_mean(x * x) - mean_x**2
  variance_y = _local_mean(y * y) - mean_y**2
  covariance = _local_mean(x * y) - mean_x * mean_y
  similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
  similarity /= mean_x**2 + mean_y**2 + _C1
  similarity /= variance_x + variance_y + _C2
  return np.mean(similarity, axis=(1, 2, 3))
