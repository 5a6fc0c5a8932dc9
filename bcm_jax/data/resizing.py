"""Center crop and resize methods of the published datasets.

The two methods define different datasets with different FID reference
statistics. Evaluate a model with the method of its training data.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from bcm_jax import errors


def _to_pil(image: np.ndarray) -> Image.Image:
  # PIL represents gray images without a channel axis.
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _to_array(image: Image.Image) -> np.ndarray:
  pixels = np.array(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def adm(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes with box and bicubic filters, then takes the center crop.

  Halves the image with a box filter while its shorter side is at least
  2 * size, resizes the shorter side to `size` with a bicubic filter, and crops:
  `center_crop_arr` of guided-diffusion (Dhariwal and Nichol, 2021), called
  'center-crop-dhariwal' in EDM2. Used by BCM, CM, iCT, CTM and EDM2.

  Args:
    image: uint8 [H, W, C], C = 1 or 3.
    size: height and width of the result.

  Returns:
    uint8 [size, size, C].
  """
  picture = _to_pil(image)
  while min(picture.size) >= 2 * size:
    half = tuple(side // 2 for side in picture.size)
    picture = picture.resize(half, Image.Resampling.BOX)
  scale = size / min(picture.size)
  scaled = tuple(round(side * scale) for side in picture.size)
  pixels = _to_array(picture.resize(scaled, Image.Resampling.BICUBIC))
  top, left = ((side - size) // 2 for side in pixels.shape[:2])
  return pixels[top : top + size, left : left + size]


def edm(image: np.ndarray, size: int) -> np.ndarray:
  """Crops the center square, then resizes it with a Lanczos filter.

  'center-crop' of EDM's dataset_tool.py (Karras et al., 2022), used for EDM's
  ImageNet-64.

  Args:
    image: uint8 [H, W, C], C = 1 or 3.
    size: height and width of the result.

  Returns:
    uint8 [size, size, C].
  """
  height, width = image.shape[:2]
  side = min(height, width)
  square = image[
      (height - side) // 2 : (height + side) // 2,
      (width - side) // 2 : (width + side) // 2,
  ]
  picture = _to_pil(np.ascontiguousarray(square))
  return _to_array(picture.resize((size, size), Image.Resampling.LANCZOS))


def none(image: np.ndarray, size: int) -> np.ndarray:
  """Returns the image unchanged.

  Args:
    image: uint8 [size, size, C].
    size: required height and width.

  Raises:
    UserError: the image has another size.
  """
  height, width = image.shape[:2]
  if (height, width) != (size, size):
    raise errors.UserError(
        f"got an image of {height}x{width} (height x width), expected"
        f" {size}x{size} with crop 'none'; set --crop / data.crop to 'adm' or"
        " 'edm'"
    )
  return image


BY_NAME: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "adm": adm,
    "edm": edm,
    "none": none,
}
