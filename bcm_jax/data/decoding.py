"""Decodes image files to pixels."""

import dataclasses
import io

import numpy as np
from PIL import Image
from PIL import PngImagePlugin

from bcm_jax import errors
from bcm_jax.data import resizing

# Number of channels -> PIL mode.
_MODES = {1: "L", 3: "RGB"}
_MAX_SIZE = 8192
_NPY = b"\x93NUMPY"
# Formats of PIL that are read. Others may start programs (EPS: Ghostscript).
_FORMATS = (
    "JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF",
    "JPEG2000", "TGA",
)
# EXIF tag of the orientation, and the values that swap height and width.
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tag of the bits per channel.
_BITS = 258
# Format -> where the bits per channel are: (start of a header, offset, what to
# add): Ssiz of the SIZ marker, and the first of the pixi box.
_DEPTHS = {
    "JPEG2000": [(b"\xff\x4f\xff\x51", 42, 1)], "AVIF": [(b"pixi", 9, 0)],
}
# Image programs write more text into a PNG than PIL's default of 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class CorruptImage(errors.UserError):
  """A file that cannot be decoded: corrupt, truncated or not an image."""


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Decodes, crops and resizes images.

  Attributes:
    channels: 3 converts every image to RGB, 1 to gray; transparency is dropped.
    size: height and width of the output; None keeps those of the image.
    crop: cropping and resizing method, a key of `resizing.BY_NAME`.
    upright: apply the EXIF orientation, as image viewers do. The published
      datasets do not.

  Raises:
    UserError: at construction, for an invalid value.
  """

  channels: int = 3
  size: int | None = None
  crop: str = "adm"
  upright: bool = True

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
      content: bytes of a file in a format of _FORMATS, or of a .npy file
        with uint8 [C, H, W], the layout of EDM2's dataset_tool.py.
      file: file name for error messages.

    Returns:
      uint8 [H, W, C], or [size, size, C] if `size` is set.

    Raises:
      CorruptImage: the bytes are not an image, or are truncated.
      UserError: more than 8 bits per channel, too many pixels, or crop 'none'
        and another size.
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
    with _opened(content, file) as image:
      if self.upright and _orientation(image) in _TURNED:
        return image.width, image.height, self.channels
      return image.height, image.width, self.channels

  def _pixels(self, content: bytes, file: str) -> np.ndarray:
    if content.startswith(_NPY):
      return _read_npy(content, file, self.channels)
    with _opened(content, file) as image:
      bits = _bits(image, content)
      try:
        image.load()
      except Exception as e:  # PIL raises many types for corrupt files.
        raise corrupt(file, e) from e
    if bits > 8:
      raise errors.UserError(
          f"{file}: got {bits} bits per channel (PIL mode {image.mode!r}),"
          " expected 8; save it as an 8-bit image"
      )
    orientation = _orientation(image) if self.upright else 1
    if "transparency" in image.info or image.mode == "PA":
      # PIL warns if such a palette is converted to RGB directly.
      image = image.convert("RGBA")
    if image.mode == "LAB":  # PIL converts it only to RGB.
      image = image.convert("RGB")
    if image.mode != _MODES[self.channels]:  # Avoids a copy.
      image = image.convert(_MODES[self.channels])
    if orientation in _TRANSPOSE:
      image = image.transpose(_TRANSPOSE[orientation])
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], self.channels)


def _opened(content: bytes, file: str) -> Image.Image:
  """Returns the image of a file, of which only the header is decoded."""
  try:
    return Image.open(io.BytesIO(content), formats=_FORMATS)
  except Image.DecompressionBombError as e:
    raise errors.UserError(
        f"{file}: too large ({e}), expected at most"
        f" {2 * Image.MAX_IMAGE_PIXELS:,} pixels; shrink the image, or delete"
        " the file"
    ) from e
  except Exception as e:  # PIL raises many types for corrupt files.
    raise corrupt(file, e) from e


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation that PIL has not applied; 1 for none."""
  if image.format == "TIFF":
    return 1
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # PIL raises many types; the pixels may be intact.
    return 1


def _bits(image: Image.Image, content: bytes) -> int:
  """Returns the bits per channel; PIL silently drops some of 16-bit RGB."""
  if image.mode in ("I", "F"):
    return 32
  if image.mode.startswith("I;"):
    return 16
  if image.format == "PNG":
    return content[24]  # In the IHDR chunk, always the first.
  if image.format == "TIFF":
    return max(image.tag_v2.get(_BITS, (8,)))
  if image.format == "PPM":
    args = image.tile[0].args  # The mode, or (mode, maximum).
    return 8 if isinstance(args, str) else int(args[-1]).bit_length()
  for start, offset, more in _DEPTHS.get(image.format, ()):
    at = content.find(start) + offset
    if offset <= at < len(content):
      return (content[at] & 0x7F) + more
  return 8


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
