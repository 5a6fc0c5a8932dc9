"""Pictures of many images: grids, captioned rows, PNG files."""

from collections.abc import Sequence
import math
import os
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from bcm_jax.errors import UserError

BACKGROUND = 255
_CAPTION_MARGIN = 4  # pixels to the left and right of a title


def _check_images(name: str, images: np.ndarray) -> np.ndarray:
  images = np.asarray(images)
  good = images.ndim == 4 and images.shape[-1] in (1, 3) and images.size > 0
  if images.dtype != np.uint8 or not good:
    raise UserError(
      f"{name} is {images.dtype} of shape {images.shape}, expected uint8 "
      "[n, H, W, C] with n >= 1 and C of 1 or 3: quantise to 0..255 first"
    )
  return images


def _check_at_least(least: int, **values: int) -> None:
  for name, value in values.items():
    if value < least:
      raise UserError(f"{name} is {value}, expected {least} or more: raise it")


def _enlarge(images: np.ndarray, scale: int) -> np.ndarray:
  """Nearest neighbour: every pixel of [n, H, W, C] becomes scale x scale."""
  return images.repeat(scale, axis=1).repeat(scale, axis=2)


def image_grid(
  images: np.ndarray,
  columns: int | None = None,
  pad: int = 1,
  scale: int = 1,
  background: int = BACKGROUND,
) -> np.ndarray:
  """Lays images out row by row.

  Args:
    images: uint8 [n, H, W, C], C of 1 or 3.
    columns: images a row; by default the nearly square ceil(sqrt(n)).
    pad: pixels of background around and between images, not enlarged.
    scale: every pixel becomes scale x scale (nearest neighbour).
    background: grey level of padding and of empty places at the end.

  Returns:
    uint8 [rows * (H * scale + pad) + pad, columns * (W * scale + pad) + pad,
    C].

  Raises:
    UserError: images that are not such, or columns, scale or pad too small.
  """
  images = _check_images("images", images)
  count = len(images)
  columns = math.ceil(math.sqrt(count)) if columns is None else columns
  _check_at_least(1, columns=columns, scale=scale)
  _check_at_least(0, pad=pad)
  cells = _enlarge(images, scale)
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
  """The title as uint8 [h, w, 1], in black or white, tight around the ink."""
  # The default font's bitmap form knows Latin-1 only; the rest becomes '?'.
  title = title.encode("latin-1", "replace").decode("latin-1")
  if not title.strip():
    return np.zeros((1, 0, 1), np.uint8)
  font = PIL.ImageFont.load_default()
  pen = PIL.ImageDraw.Draw(PIL.Image.new("L", (1, 1)))
  left, top, right, bottom = pen.textbbox((0, 0), title, font=font)
  size = math.ceil(right - left) + 1, math.ceil(bottom - top) + 1
  picture = PIL.Image.new("L", size, background)
  ink = 0 if background >= 128 else 255
  PIL.ImageDraw.Draw(picture).text((-left, -top), title, fill=ink, font=font)
  return np.asarray(picture)[:, :, None]


def _place_centred(canvas: np.ndarray, picture: np.ndarray, left: int) -> None:
  """Writes picture into canvas at `left`, halfway down; grey spreads to RGB."""
  height, width, _ = picture.shape
  top = (canvas.shape[0] - height) // 2
  canvas[top : top + height, left : left + width] = picture


def captioned_rows(
  rows: Sequence[tuple[str, np.ndarray]],
  pad: int = 1,
  scale: int = 1,
  background: int = BACKGROUND,
) -> np.ndarray:
  """Stacks rows of images, each with its title on the left.

  For pictures such as original / latent / reconstruction, where the k-th
  images of all rows belong together.

  Args:
    rows: (title, images uint8 [n, H, W, C]) a row, from top to bottom; a
      title may hold line breaks. Rows may differ in n and size; grey becomes
      RGB where any row is RGB. Latents: bring them to 0..255 first.
    pad: pixels of background around and between images, not enlarged.
    scale: every pixel of an image becomes scale x scale; titles keep size.
    background: grey level around images; titles are black on a light one and
      white on a dark one.

  Returns:
    uint8 [H', W', C].

  Raises:
    UserError: no rows, images that are not such, or scale or pad too small.
  """
  if not rows:
    raise UserError("there are no rows, expected at least one: pass some")
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
    # A caption may be taller than 8x8 images are.
    height = max(strip.shape[0], caption.shape[0] + 2)
    canvas = np.full((height, width, channels), background, np.uint8)
    _place_centred(canvas, caption, _CAPTION_MARGIN)
    _place_centred(canvas, strip, margin)
    canvases.append(canvas)
  return np.concatenate(canvases)


def save_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
  """Writes a PNG whole or not at all, over what was there.

  Args:
    path: the file; its directory must exist.
    array: uint8 [H, W], [H, W, 1] or [H, W, 3].

  Raises:
    UserError: an array that is not such, or no such directory.
  """
  path = pathlib.Path(path)
  array = np.asarray(array)
  plane = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
  shape_ok = plane.ndim == 2 or (plane.ndim == 3 and plane.shape[2] == 3)
  if array.dtype != np.uint8 or not shape_ok or array.size == 0:
    raise UserError(
      f"the picture for {path} is {array.dtype} of shape {array.shape}, "
      "expected uint8 [H, W], [H, W, 1] or [H, W, 3]: pass one picture, "
      "in grey or RGB"
    )
  if not path.parent.is_dir():
    raise UserError(
      f"cannot write {path}: there is no directory {path.parent}; make it first"
    )
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      PIL.Image.fromarray(plane).save(file, format="PNG")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
