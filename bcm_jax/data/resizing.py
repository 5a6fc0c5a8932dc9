"""Images to squares, as the published data sets were made.

The two crops give different data sets, with different Frechet references:
a model is compared under the crop that it was trained on.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from bcm_jax import errors


def _to_pil(image: np.ndarray) -> Image.Image:
  # PIL knows grey images without their axis of channels only.
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _to_array(image: Image.Image) -> np.ndarray:
  pixels = np.array(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def adm(image: np.ndarray, size: int) -> np.ndarray:
  """Halves by boxes, resizes by a bicubic filter, crops the centre.

  Halving while the short side is at least twice `size`, then the short side
  becomes `size`: `center_crop_arr` of guided-diffusion (Dhariwal and Nichol,
  2021), 'center-crop-dhariwal' of EDM2. BCM, CM, iCT, CTM and EDM2 train on it.

  Args:
    image: uint8 [H, W, C], C = 1 or 3.
    size: pixels a side of the result.

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
  """Crops the central square, then resizes by a Lanczos filter.

  'center-crop' of EDM's dataset_tool.py (Karras et al., 2022), by which its
  ImageNet-64 was made.

  Args:
    image: uint8 [H, W, C], C = 1 or 3.
    size: pixels a side of the result.

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
  """Returns the image, which must be [size, size, C] already.

  Raises:
    UserError: it is not.
  """
  height, width = image.shape[:2]
  if (height, width) != (size, size):
    raise errors.UserError(
        f"the image is {height}x{width} (height x width), expected"
        f" {size}x{size}, for crop 'none' changes nothing; set --crop /"
        " data.crop to 'adm' or 'edm'"
    )
  return image


BY_NAME: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "adm": adm,
    "edm": edm,
    "none": none,
}
