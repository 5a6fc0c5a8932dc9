"""Mean squared error and PSNR of reconstructions.

The convention of BCM (Li and He, 2024, arXiv:2403.18035, and its released
image_sample.py): both images as uint8 (truncated, not rounded), divided by
255, squared error averaged over pixels and channels.
"""

import numpy as np

from bcm_jax.errors import UserError


def per_pixel_mse(
  original_uint8: np.ndarray, reconstruction_uint8: np.ndarray
) -> np.ndarray:
  """Computes the mean squared error of each image on the [0, 1] scale.

  Args:
    original_uint8: uint8 [n, H, W, C].
    reconstruction_uint8: uint8 [n, H, W, C].

  Returns:
    float64 [n], in [0, 1].

  Raises:
    UserError: different shapes, empty images, or a dtype other than uint8.
  """
  original, reconstruction = pairs(original_uint8, reconstruction_uint8)
  # Converted before the subtraction, because uint8 would wrap around.
  difference = original.astype(np.float64) - reconstruction.astype(np.float64)
  axes = tuple(range(1, original.ndim))
  return np.mean((difference / 255.0) ** 2, axis=axes)


def pairs(
  original_uint8: np.ndarray, reconstruction_uint8: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Checks that two batches of images can be compared pairwise.

  Args:
    original_uint8: uint8 [n, H, W, C].
    reconstruction_uint8: uint8 [n, H, W, C].

  Returns:
    Both as arrays.

  Raises:
    UserError: different shapes, empty images, or a dtype other than uint8.
  """
  original = np.asarray(original_uint8)
  reconstruction = np.asarray(reconstruction_uint8)
  for name, images in (
    ("original", original),
    ("reconstruction", reconstruction),
  ):
    if images.dtype != np.uint8:
      raise UserError(
        f"{name}: got {images.dtype}, expected uint8; quantize both batches "
        "to 0..255 first"
      )
  if original.shape != reconstruction.shape:
    raise UserError(
      f"original and reconstruction: got shapes {original.shape} and "
      f"{reconstruction.shape}, expected the same; pass them in pairs"
    )
  if original.ndim < 2 or original[:1].size == 0:
    raise UserError(
      f"original: got shape {original.shape}, expected [n, H, W, C] with at "
      "least one image; pass a batch"
    )
  return original, reconstruction


def psnr(mse: np.ndarray | float) -> np.ndarray:
  """Computes the peak signal-to-noise ratio in dB from an MSE on the [0, 1]
  scale.

  The mean of PSNRs differs from the PSNR of the mean MSE; report which is used.

  Args:
    mse: any shape, >= 0.

  Returns:
    float64 of the same shape; infinity where mse is 0.

  Raises:
    UserError: an mse below 0.
  """
  mse = np.asarray(mse, np.float64)
  if np.any(mse < 0):
    raise UserError(
      f"mse: got {mse.min():g}, expected >= 0; pass the output of per_pixel_mse"
    )
  with np.errstate(divide="ignore"):
    return -10.0 * np.log10(mse)
