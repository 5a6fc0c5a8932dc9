"""Similarity of images to their references: MSE, PSNR, SSIM, LPIPS."""

from collections.abc import Callable, Sequence

import numpy as np

from bcm_jax.data import image_source
from bcm_jax.interop.families import vgg_names
from bcm_jax.metrics import lpips
from bcm_jax.metrics import reconstruction
from bcm_jax.metrics import ssim

Perceptual = Callable[[np.ndarray, np.ndarray], np.ndarray]

_LPIPS_BLOCK = 64


def perceptual(paths: Sequence[str]) -> Perceptual | None:
  """Loads the LPIPS metric (Zhang et al., 2018).

  Args:
    paths: weight files, see vgg_names.load_lpips; may be empty.

  Returns:
    Function (uint8 [n, H, W, C], uint8 [n, H, W, C]) -> float [n]; None
    without weight files.
  """
  if not paths:
    return None
  params = vgg_names.load_lpips(*paths)

  def measure(originals, images):
    blocks = range(0, len(images), _LPIPS_BLOCK)
    parts = [slice(i, i + _LPIPS_BLOCK) for i in blocks]
    return np.concatenate(
      [
        lpips.distance(
          params,
          image_source.to_float(originals[p]),
          image_source.to_float(images[p]),
        )
        for p in parts
      ]
    )

  return measure


def errors(
  originals: np.ndarray, images: np.ndarray, measure: Perceptual | None
) -> dict[str, float]:
  """Computes reference-based metrics.

  Args:
    originals, images: uint8 [n, H, W, C].
    measure: LPIPS of `perceptual`, or None.

  Returns:
    Metrics by name: number of 'images', 'mse' and 'mse_worst_image' on the
    [0, 1] scale, 'psnr' of the mean MSE in dB, 'ssim' if its window fits into
    the images, 'lpips' with `measure`.
  """
  mse = reconstruction.per_pixel_mse(originals, images)
  numbers = {
    "images": len(mse),
    "mse": float(np.mean(mse)),
    "mse_worst_image": float(np.max(mse)),
    "psnr": float(reconstruction.psnr(np.mean(mse))),
  }
  if min(originals.shape[1:3]) >= ssim.WINDOW:
    values = ssim.structural_similarity(originals, images)
    numbers["ssim"] = float(np.mean(values))
  if measure is not None:
    numbers["lpips"] = float(np.mean(measure(originals, images)))
  return numbers
