"""Decodes image files to pixels."""

import dataclasses
import io

import numpy as np
from PIL import Image

from bcm_jax import errors
from bcm_jax.data import resizing

# Number of channels -> PIL mode.
_MODES = {1: "L", 3: "RGB"}
_NPY = b"\x93NUMPY"
# Largest side of resized images, in pixels.
_MAX_SIZE = 65536


class CorruptImage(errors.UserError):
  """A file that cannot be decoded: corrupt, truncated or not an image."""


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Decodes, crops and resizes images.

  Attributes:
    channels: 3 converts every image to RGB, 1 to gray; transparency is dropped.
    size: height and width of the output; None keeps those of the image.
    crop: cropping and resizing method, a key of `resizing.BY_NAME`.

  Raises:
    UserError: at construction, for an invalid value.
  """

  channels: int = 3
  size: int | None = None
  crop: str = "adm"

  def __post_init__(self):
    if self.channels not in _MODES:
      raise errors.UserError(
          f"channels: got {self.channels}, expected 1 (gray) or 3 (RGB); change"
          " it"
      )
    if self.crop not in resizing.BY_NAME:
      raise errors.unknown_name("crop", self.crop, resizing.BY_NAME)
    if self.size is not None and not 1 <= self.size <= _MAX_SIZE:
      raise errors.UserError(
          f"size: got {self.size}, expected 1 to {_MAX_SIZE} pixels; change it"
      )

  def __call__(self, content: bytes, file: str) -> np.ndarray:
    """Decodes one image.

    Args:
      content: bytes of a file in any format that PIL reads, or of a .npy file
        with uint8 [C, H, W], the layout of EDM2's dataset_tool.py.
      file: file name for error messages.

    Returns:
      uint8 [H, W, C], or [size, size, C] if `size` is set.

    Raises:
      CorruptImage: the bytes are not an image, or are truncated.
      UserError: more than 8 bits per channel, or crop 'none' and another size.
    """
    pixels = self._pixels(content, file)
    # Crops return an image of the target size unchanged; skip their cost.
    if self.size is None or pixels.shape[:2] == (self.size, self.size):
      return pixels
    try:
      return resizing.BY_NAME[self.crop](pixels, self.size)
    except errors.UserError as e:
      raise errors.UserError(f"{file}: {e}") from e

  def shape(self, content: bytes, file: str) -> tuple[int, int, int]:
    """Returns the shape (H, W, C) of `__call__`; reads only the header."""
    if self.size is not None:
      return self.size, self.size, self.channels
    if content.startswith(_NPY):
      return self(content, file).shape
    try:
      with Image.open(io.BytesIO(content)) as image:
        return image.height, image.width, self.channels
    except Exception as e:  # PIL raises many types for corrupt files.
      raise corrupt(file, e) from e

  def _pixels(self, content: bytes, file: str) -> np.ndarray:
    if content.startswith(_NPY):
      return _read_npy(content, file, self.channels)
    try:
      with Image.open(io.BytesIO(content)) as image:
        image.load()
    except Exception as e:  # PIL raises many types for corrupt files.
      raise corrupt(file, e) from e
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
      raise errors.UserError(
          f"{file}: got PIL mode {image.mode!r}, expected 8 bits per channel;"
          " save it as an 8-bit image"
      )
    if "transparency" in image.info:
      # PIL warns if such a palette is converted to RGB directly.
      image = image.convert("RGBA")
    if image.mode != _MODES[self.channels]:  # Avoids a copy.
      image = image.convert(_MODES[self.channels])
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], self.channels)


def _read_npy(content: bytes, file: str, channels: int) -> np.ndarray:
  try:
    array = np.load(io.BytesIO(content), allow_pickle=False)
  except Exception as e:  # NumPy raises many types for corrupt files.
    raise corrupt(file, e) from e
  if array.dtype != np.uint8 or array.ndim != 3 or len(array) != channels:
    raise errors.UserError(
        f"{file}: got {array.dtype} of shape {array.shape}, expected uint8"
        f" [{channels}, H, W]; latents of an autoencoder are not supported"
    )
  return np.ascontiguousarray(np.moveaxis(array, 0, -1))


def corrupt(file: str, error: Exception) -> CorruptImage:
  """Returns the error for a file that cannot be decoded."""
  reason = " ".join(str(error).split())[:160]
  return CorruptImage(
      f"{file}: cannot be decoded ({type(error).__name__}: {reason}), expected"
      " an image; delete or replace the file, or set --skip_corrupt /"
      " data.skip_corrupt=True"
  )
