"""Image grids, captioned rows of images, and PNG files."""

from collections.abc import Sequence
import math
import os
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from bcm_jax.data import image_source
from bcm_jax.errors import UserError
from bcm_jax.utils import files

BACKGROUND = 255
_CAPTION_MARGIN = 4  # pixels to the left and right of a title


def _check_images(name: str, images: np.ndarray) -> np.ndarray:
  images = image_source.check_images(images, name)
  if images.shape[-1] not in (1, 3):
    raise UserError(f"{name}: got {images.shape[-1]} channels, expected 1 or 3")
  return images


def _check_at_least(minimum: int, **values: int) -> None:
  for name, value in values.items():
    if value < minimum:
      raise UserError(f"{name}: got {value}, expected {minimum} or more")


def image_grid(
  images: np.ndarray,
  columns: int | None = None,
  pad: int = 1,
  scale: int = 1,
  background: int = BACKGROUND,
) -> np.ndarray:
  """Arranges images in a grid, row by row.

  Args:
    images: uint8 [n, H, W, C], C of 1 or 3.
    columns: images per row; ceil(sqrt(n)) by default.
    pad: pixels of background around and between images, not enlarged.
    scale: integer factor of nearest-neighbor upsampling.
    background: gray level of the padding and of empty cells.

  Returns:
    uint8 [rows * (H * scale + pad) + pad, columns * (W * scale + pad) + pad,
    C].

  Raises:
    UserError: wrong dtype or shape of images, or columns, scale or pad too
      small.
  """
  images = _check_images("images", images)
  count = len(images)
  columns = math.ceil(math.sqrt(count)) if columns is None else columns
  _check_at_least(1, columns=columns, scale=scale)
  _check_at_least(0, pad=pad)
  cells = images.repeat(scale, axis=1).repeat(scale, axis=2)
  _, height, width, channels = cells.shape
  rows = math.ceil(count / columns)
  grid = np.full(
    (
      rows * (height + pad) + pad,
      columns * (width + pad) + pad,
      channels,
    ),
    background,
    np.uint8,
  )
  for index, cell in enumerate(cells):
    top = pad + index // columns * (height + pad)
    left = pad + index % columns * (width + pad)
    grid[top : top + height, left : left + width] = cell
  return grid


def _caption(title: str, background: int) -> np.ndarray:
  """Renders text as uint8 [h, w, 1], black or white, cropped to the ink."""
  # The default bitmap font has only Latin-1; other letters become '?'.
  title = title.encode("latin-1", "replace").decode("latin-1")
  if not title.strip():
    return np.zeros((1, 0, 1), np.uint8)
  font = PIL.ImageFont.load_default()
  pen = PIL.ImageDraw.Draw(PIL.Image.new("L", (1, 1)))
  left, top, right, bottom = pen.textbbox((0, 0), title, font=font)
  size = math.ceil(right - left) + 1, math.ceil(bottom - top) + 1
  image = PIL.Image.new("L", size, background)
  ink = 0 if background >= 128 else 255
  PIL.ImageDraw.Draw(image).text((-left, -top), title, fill=ink, font=font)
  return np.asarray(image)[:, :, None]


def _place_centered(canvas: np.ndarray, image: np.ndarray, left: int) -> None:
  """Writes image into canvas at `left`, vertically centered."""
  height, width, _ = image.shape
  top = (canvas.shape[0] - height) // 2
  canvas[top : top + height, left : left + width] = image


def captioned_rows(
  rows: Sequence[tuple[str, np.ndarray]],
  pad: int = 1,
  scale: int = 1,
  background: int = BACKGROUND,
) -> np.ndarray:
  """Stacks rows of images, each with its title on the left.

  For figures such as original / latent / reconstruction, where each column
  shows one example.

  Args:
    rows: (title, images uint8 [n, H, W, C]) per row, from top to bottom. Titles
      may have line breaks. Rows may differ in n and image size; gray images
      become RGB if any row is RGB. Map latents to 0..255 first.
    pad: pixels of background around and between images, not enlarged.
    scale: integer factor of nearest-neighbor upsampling of the images.
    background: gray level around images; titles are black on a light
      background and white on a dark one.

  Returns:
    uint8 [H', W', C].

  Raises:
    UserError: no rows, wrong dtype or shape of images, or scale or pad too
      small.
  """
  if not rows:
    raise UserError("rows: got 0, expected at least one")
  captions = [_caption(title, background) for title, _ in rows]
  checked = [_check_images(f"row {title!r}", images) for title, images in rows]
  strips = [
    image_grid(images, len(images), pad, scale, background)
    for images in checked
  ]
  margin = max(caption.shape[1] for caption in captions) + 2 * _CAPTION_MARGIN
  width = margin + max(strip.shape[1] for strip in strips)
  channels = max(strip.shape[2] for strip in strips)
  canvases = []
  for caption, strip in zip(captions, strips, strict=True):
    # A caption may be taller than its images, for example at 8x8 pixels.
    height = max(strip.shape[0], caption.shape[0] + 2)
    canvas = np.full((height, width, channels), background, np.uint8)
    _place_centered(canvas, caption, _CAPTION_MARGIN)
    _place_centered(canvas, strip, margin)
    canvases.append(canvas)
  return np.concatenate(canvases)


def save_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
  """Writes a PNG atomically; replaces an existing file.

  Args:
    path: file to write; its directory must exist.
    array: uint8 [H, W], [H, W, 1] or [H, W, 3].

  Raises:
    UserError: wrong dtype or shape, or a missing directory.
  """
  path = pathlib.Path(path)
  array = np.asarray(array)
  plane = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
  shape_ok = plane.ndim == 2 or (plane.ndim == 3 and plane.shape[2] == 3)
  if array.dtype != np.uint8 or not shape_ok or array.size == 0:
    raise UserError(
      f"{path}: got {array.dtype} of shape {array.shape}, expected uint8 "
      "[H, W], [H, W, 1] or [H, W, 3]; pass one image, gray or RGB"
    )
  if not path.parent.is_dir():
    raise UserError(
      f"{path}: the directory {path.parent} does not exist; create it first"
    )
  with files.replacing(path) as file:
    PIL.Image.fromarray(plane).save(file, format="PNG")
