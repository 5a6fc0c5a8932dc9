"""Decodes image files to pixels."""

import dataclasses
import io

import numpy as np
from PIL import Image

from bcm_jax import errors
from bcm_jax.data import resizing

# Modes of PIL by number of channels.
_MODES = {1: "L", 3: "RGB"}
_NPY = b"\x93NUMPY"


class CorruptImage(errors.UserError):
  """An image that is damaged, cut short or no image at all."""


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Turns the bytes of an image file into pixels.

  Attributes:
    channels: 3 makes every image RGB, 1 makes it grey; transparency is
      dropped.
    size: pixels a side; None keeps the image's own height and width.
    crop: how it becomes that size, a key of `resizing.BY_NAME`.

  Raises:
    UserError: on making it, for a value that is not among these.
  """

  channels: int = 3
  size: int | None = None
  crop: str = "adm"

  def __post_init__(self):
    if self.channels not in _MODES:
      raise errors.UserError(
          f"channels is {self.channels}, expected 1 (grey) or 3 (RGB)"
      )
    if self.crop not in resizing.BY_NAME:
      raise errors.unknown_name("crop", self.crop, resizing.BY_NAME)
    if self.size is not None and self.size < 1:
      raise errors.UserError(
          f"size is {self.size}, expected 1 or more pixels a side"
      )

  def __call__(self, content: bytes, file: str) -> np.ndarray:
    """Decodes one image.

    Args:
      content: of a file in any format that PIL reads, or of a .npy file with
        uint8 [C, H, W], as EDM2's dataset_tool.py lays it out.
      file: name for error messages.

    Returns:
      uint8 [H, W, C], or [size, size, C] where a size is set.

    Raises:
      CorruptImage: the bytes are not an image, or not all of it.
      UserError: more than 8 bits a channel, or crop 'none' and another size.
    """
    pixels = self._pixels(content, file)
    # At the right size every crop returns the same pixels, only later.
    if self.size is None or pixels.shape[:2] == (self.size, self.size):
      return pixels
    try:
      return resizing.BY_NAME[self.crop](pixels, self.size)
    except errors.UserError as e:
      raise errors.UserError(f"{file}: {e}") from e

  def shape(self, content: bytes, file: str) -> tuple[int, int, int]:
    """Returns the (H, W, C) of `__call__`, from the header alone."""
    if self.size is not None:
      return self.size, self.size, self.channels
    if content.startswith(_NPY):
      return self(content, file).shape
    try:
      with Image.open(io.BytesIO(content)) as image:
        return image.height, image.width, self.channels
    except Exception as e:  # Whatever PIL raises for a damaged file.
      raise corrupt(file, e) from e

  def _pixels(self, content: bytes, file: str) -> np.ndarray:
    if content.startswith(_NPY):
      return _read_npy(content, file, self.channels)
    try:
      with Image.open(io.BytesIO(content)) as image:
        image.load()
    except Exception as e:  # Whatever PIL raises for a damaged file.
      raise corrupt(file, e) from e
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
      raise errors.UserError(
          f"{file} has pixels of PIL's mode {image.mode!r}, expected 8 bits a"
          " channel; save it as an 8-bit image"
      )
    if "transparency" in image.info:
      # PIL warns where such a palette goes to RGB without this step.
      image = image.convert("RGBA")
    if image.mode != _MODES[self.channels]:  # Else it would be copied.
      image = image.convert(_MODES[self.channels])
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], self.channels)


def _read_npy(content: bytes, file: str, channels: int) -> np.ndarray:
  try:
    array = np.load(io.BytesIO(content), allow_pickle=False)
  except Exception as e:  # Whatever NumPy raises for a damaged file.
    raise corrupt(file, e) from e
  if array.dtype != np.uint8 or array.ndim != 3 or len(array) != channels:
    raise errors.UserError(
        f"{file} holds {array.dtype} of shape {array.shape}, expected uint8"
        f" [{channels}, H, W]; latents of an autoencoder are no images"
    )
  return np.ascontiguousarray(np.moveaxis(array, 0, -1))


def corrupt(file: str, error: Exception) -> CorruptImage:
  """The error for a file that could not be read or decoded."""
  reason = " ".join(str(error).split())[:160]
  return CorruptImage(
      f"{file} cannot be decoded ({type(error).__name__}: {reason}), expected"
      " an image; delete or replace the file, or set --skip_corrupt /"
      " data.skip_corrupt=True"
  )
