"""Image files that people bring, as pixels that a network takes."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from bcm_jax import errors
from bcm_jax.data import resizing

# Nothing that runs programs of its own (as EPS does) or holds no pixels.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB"}
_KEY = "set edit.resize=true to have it"


def open_picture(
    content: bytes, name: str, most_pixels: int | None = None
) -> PIL.Image.Image:
  """An image file, decoded and turned as its camera was held.

  Args:
    content: of the file.
    name: for errors.
    most_pixels: more are refused before they are decoded.

  Raises:
    UserError: no image of `FORMATS`, cut short, or too large.
  """
  try:
    picture = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = picture.size
    if most_pixels is None or width * height <= most_pixels:
      picture.load()
      picture = PIL.ImageOps.exif_transpose(picture)
  except Exception as e:  # Whatever PIL raises for what is no image.
    raise errors.UserError(
        f"{name} cannot be read as an image; give a PNG, JPEG, WebP or BMP file"
    ) from e
  if most_pixels is not None and width * height > most_pixels:
    raise errors.UserError(
        f"{name} has {width}x{height} pixels, more than "
        f"{most_pixels // 10**6} million; give a smaller one"
    )
  if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
    raise errors.UserError(
        f"{name} has more than 8 bits a channel; save it as an 8-bit image"
    )
  return picture


def pixels_of(picture: PIL.Image.Image, channels: int) -> np.ndarray:
  """A picture as uint8 [H, W, C], transparency dropped.

  Raises:
    UserError: a number of channels that no picture has.
  """
  if channels not in _MODES:
    raise errors.UserError(
        f"the network makes images of {channels} channels; files have 1 or 3"
    )
  if "transparency" in picture.info:
    picture = picture.convert("RGBA")  # PIL would warn otherwise.
  array = np.array(picture.convert(_MODES[channels]))
  return array.reshape(*array.shape[:2], channels)


def middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """The largest part in the middle with the proportions of height x width."""
  rows, columns = pixels.shape[:2]
  keep_rows = min(rows, max(1, round(columns * height / width)))
  keep_columns = min(columns, max(1, round(rows * width / height)))
  top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
  return pixels[top : top + keep_rows, left : left + keep_columns]


def fitted(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """Pixels uint8 [h, w, C] cut and resized to [height, width, C].

  Squares go the way of ADM's training images.
  """
  if pixels.shape[:2] == (height, width):
    return pixels
  pixels = middle(pixels, height, width)
  if height == width:
    return resizing.adm(pixels, height)
  planes = [
      np.asarray(PIL.Image.fromarray(pixels[..., c]).resize(
          (width, height), PIL.Image.Resampling.BICUBIC
      ))
      for c in range(pixels.shape[-1])
  ]
  return np.stack(planes, axis=-1)


def covered_share(alpha: np.ndarray, height: int, width: int) -> np.ndarray:
  """How much of each pixel is white in [h, w] of 0 to 255: [height, width].

  Cut as `fitted` cuts, so that a mask stays on what it was drawn on.
  """
  part = PIL.Image.fromarray(middle(alpha, height, width))
  small = part.resize((width, height), PIL.Image.Resampling.BOX)
  return np.asarray(small) / 255.0


def read_image(
    content: bytes, name: str, shape: tuple[int, int, int], resize: bool,
    any_colours: bool = False,
) -> np.ndarray:
  """An image file as uint8 of a shape.

  Args:
    content: of the file.
    name: for errors.
    shape: (H, W, C) that is wanted.
    resize: make other sizes and channels fit, see `fitted`.
    any_colours: take grey for coloured files and the other way.

  Raises:
    UserError: unreadable, or it does not fit and `resize` is not asked for.
  """
  height, width, channels = shape
  picture = open_picture(content, name)
  pixels = pixels_of(picture, channels)
  if resize:
    return fitted(pixels, height, width)
  if pixels.shape[:2] != (height, width):
    raise errors.UserError(
        f"{name} is {pixels.shape[0]}x{pixels.shape[1]} pixels (height x "
        f"width), and the network takes {height}x{width}; {_KEY} resized and "
        "cropped"
    )
  grey = picture.mode in ("1", "L", "LA")
  if grey != (channels == 1) and not any_colours:
    kind = "grey" if grey else "coloured"
    raise errors.UserError(
        f"{name} is {kind}, and the network takes images of {channels} "
        f"channel{'s' if channels > 1 else ''}; {_KEY} converted"
    )
  return pixels


def read_mask(
    content: bytes, name: str, shape: tuple[int, int, int], resize: bool
) -> np.ndarray:
  """A mask file as bool [H, W], true where it is white.

  Raises:
    UserError: unreadable, another size, or all black.
  """
  height, width, _ = shape
  grey = pixels_of(open_picture(content, name), 1)[..., 0]
  if grey.shape != (height, width) and not resize:
    raise errors.UserError(
        f"the mask {name} is {grey.shape[0]}x{grey.shape[1]}, expected "
        f"{height}x{width}; {_KEY} resized"
    )
  mask = covered_share(grey, height, width) >= 0.5
  if not mask.any():
    raise errors.UserError(
        f"the mask {name} has no hole; paint what is to be filled white"
    )
  return mask
