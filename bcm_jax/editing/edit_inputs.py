"""Inputs of mode edit: image files, or degraded test images."""

import dataclasses
import io
import os

import numpy as np
import PIL.Image
import PIL.ImageOps

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.data import decoding
from bcm_jax.data import folder
from bcm_jax.data import image_source
from bcm_jax.data import resizing
from bcm_jax.sampling import zero_shot

# Raster formats only: decoding EPS would run a PostScript program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB"}
_RESIZE_HINT = "set edit.resize=true to resize, crop and convert it"
# Noise level of test images if edit.sigma is None.
_NOISE = 0.5
# Number of training images per block in `of_class`.
_BLOCK = 1000


@dataclasses.dataclass
class Inputs:
  """Images and labels of a task.

  Attributes:
    names: [n], names of files, or indices in the test split.
    images: uint8 [n, H, W, C], images to edit; 'super_resolve': smaller ones.
    labels: int32 [n], or None.
    reference: uint8 [n, H, W, C], expected results, or None.
    exact: float32 [n, H, W, C], noisy images of 'denoise' without the clipping
      of `images`, or None.
    mask: bool [n, H, W] or [H, W], true in the holes, for inpainting.
    second: uint8 [n, H, W, C], the second images of 'interpolate'.
    second_labels: int32 [n], classes of `second`, or None.
  """

  names: list[str]
  images: np.ndarray
  labels: np.ndarray | None
  reference: np.ndarray | None = None
  exact: np.ndarray | None = None
  mask: np.ndarray | None = None
  second: np.ndarray | None = None
  second_labels: np.ndarray | None = None


def read(experiment: build.Experiment) -> Inputs:
  """Reads the images of config section `edit`.

  Raises:
    UserError: missing, unreadable or unsuitable files.
  """
  section = experiment.edit
  _check(experiment, section)
  if section.input is None:
    return _degraded_inputs(experiment, section)
  return _files(experiment, section)


def _check(experiment, section: schema.Edit) -> None:
  """Raises UserError for a factor that does not divide the images."""
  height, width, _ = experiment.image_shape
  factor = section.factor
  if section.task == "super_resolve" and (height % factor or width % factor):
    raise errors.UserError(
        f"edit.factor: got {factor}, expected a divisor of {height}x{width} "
        "pixels, at least 2"
    )


# Files ----------------------------------------------------------------------


def listing(path: str, key: str) -> list[str]:
  """Lists image files: the path itself, or the files of a folder.

  Args:
    path: file or folder.
    key: config key, for errors.

  Raises:
    UserError: the path does not exist, or the folder contains no images.
  """
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    raise errors.UserError(
        f"{key}: got {path}, which does not exist, expected a file or folder"
    )
  paths = sorted(
      entry.path for entry in os.scandir(path)
      if entry.name.lower().endswith(folder.EXTENSIONS)
      and entry.name[0] != "." and entry.is_file()
  )
  if not paths:
    raise errors.UserError(
        f"{key}: got {path}, expected images "
        f"({', '.join(folder.EXTENSIONS)}) in this folder"
    )
  return paths


def _read(paths, shape, resize, any_colors=False) -> np.ndarray:
  """Reads image files as uint8 [n, H, W, C]; see `read_image`."""
  return np.stack([
      read_image(_content(path), path, shape, resize, any_colors)
      for path in paths
  ])


def _content(path: str) -> bytes:
  try:
    with open(path, "rb") as f:
      return f.read()
  except OSError as e:
    raise errors.UserError(
        f"{path}: cannot be read ({e.strerror}); check the path"
    ) from e


def _files(experiment, section: schema.Edit) -> Inputs:
  """Reads the inputs of a task from files."""
  shape, resize = experiment.image_shape, section.resize
  paths = listing(section.input, "edit.input")
  input_shape = shape
  if section.task == "super_resolve":
    k = section.factor
    input_shape = (shape[0] // k, shape[1] // k, shape[2])
  images = _read(paths, input_shape, resize, section.task == "colorize")
  inputs = Inputs(
      _names(paths), images, labels_of(experiment, section, len(paths)),
  )
  if section.reference is not None:
    inputs.reference = _read_pairs(
        section.reference, "edit.reference", len(paths), shape, resize
    )
  if section.task == "interpolate":
    if section.end_images is None:
      raise errors.UserError(
          "edit.end_images: got None, expected the second image or folder of "
          "edit.task='interpolate'"
      )
    inputs.second = _read_pairs(
        section.end_images, "edit.end_images", len(paths), shape, resize
    )
    inputs.second_labels = inputs.labels
    if section.new_label is not None:
      inputs.second_labels = np.full(len(paths), section.new_label, np.int32)
  if section.task.startswith("inpaint"):
    inputs.mask = _mask(section, shape, len(paths))
  return inputs


def _names(paths: list[str]) -> list[str]:
  """Returns file names without suffix, or with it where they would clash."""
  files = [os.path.basename(p) for p in paths]
  names = [os.path.splitext(f)[0] for f in files]
  if len(set(names)) < len(names):
    return [f.replace(".", "_") for f in files]
  return names


def _read_pairs(path, key: str, count: int, shape, resize) -> np.ndarray:
  """Reads one image per image of edit.input, in the order of names."""
  paths = listing(path, key)
  if len(paths) != count:
    raise errors.UserError(
        f"{key}: got {len(paths)} images in {path}, expected {count} as in "
        "edit.input, in the order of their names"
    )
  return _read(paths, shape, resize)


def _mask(section: schema.Edit, shape, count: int) -> np.ndarray:
  """Reads edit.mask; returns a central square if it is None."""
  if section.mask is None:
    mask = np.zeros(shape[:2], bool)
    height, width = shape[:2]
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    return mask
  paths = listing(section.mask, "edit.mask")
  if len(paths) not in (1, count):
    raise errors.UserError(
        f"edit.mask: got {len(paths)} images in {section.mask}, expected one, "
        f"or {count} as in edit.input"
    )
  masks = [read_mask(_content(p), p, shape, section.resize) for p in paths]
  return masks[0] if len(masks) == 1 else np.stack(masks)


def covered(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns images uint8 [n, H, W, C] with gray holes where mask is true."""
  hole = np.broadcast_to(mask, images.shape[:3])[..., None]
  return np.where(hole, np.uint8(127), images)


def labels_of(
    experiment, section: schema.Edit, count: int
) -> np.ndarray | None:
  """Returns edit.label as int32 [count]; zeros with edit.predict_labels."""
  labels = section.label
  if experiment.num_classes is None:
    return None
  if section.predict_labels and labels:
    raise errors.UserError(
        f"edit.label: got {labels} and edit.predict_labels=true, expected only "
        "one of the two; omit the other"
    )
  if section.predict_labels:
    labels = (0,)
  if len(labels) not in (1, count):
    raise errors.UserError(
        f"edit.label: got {labels}, expected classes of the images from 0 to "
        f"{experiment.num_classes - 1}; give one for all or {count}, or set "
        "edit.predict_labels=true to predict them"
    )
  return np.broadcast_to(np.asarray(labels, np.int32), (count,)).copy()


# Decoding -----------------------------------------------------------------


def open_picture(
    content: bytes, name: str, most_pixels: int | None = None
) -> PIL.Image.Image:
  """Decodes an image file and applies its EXIF orientation.

  Args:
    content: bytes of the file.
    name: name of the file, for errors.
    most_pixels: larger images are errors before decoding; None is no limit.

  Raises:
    UserError: another format than `FORMATS`, truncated, too large, or more
      than 8 bits per channel.
  """
  try:
    picture = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = picture.size
    if most_pixels is None or width * height <= most_pixels:
      picture.load()
      picture = PIL.ImageOps.exif_transpose(picture)
  except Exception as e:  # PIL raises various exceptions for bad files.
    raise errors.UserError(
        f"{name}: cannot be read as an image ({type(e).__name__}); use a PNG, "
        "JPEG, WebP or BMP file"
    ) from e
  if most_pixels is not None and width * height > most_pixels:
    raise errors.UserError(
        f"{name}: got {width}x{height} pixels, expected at most "
        f"{most_pixels // 10**6} million; resize it"
    )
  check_depth(picture, name)
  return picture


def check_depth(picture: PIL.Image.Image, name: str) -> None:
  """Raises UserError for a picture of more than 8 bits per channel."""
  if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
    raise errors.UserError(
        f"{name}: got more than 8 bits per channel, expected 8; convert it"
    )


def pixels_of(picture: PIL.Image.Image, channels: int) -> np.ndarray:
  """Converts a picture to uint8 [H, W, C] and drops transparency.

  Raises:
    UserError: a number of channels other than 1 and 3.
  """
  if channels not in _MODES:
    raise errors.UserError(
        f"network: got {channels} channels, expected 1 or 3 for image files"
    )
  if "transparency" in picture.info:
    picture = picture.convert("RGBA")  # PIL would warn otherwise.
  array = np.array(picture.convert(_MODES[channels]))
  return array.reshape(*array.shape[:2], channels)


def middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """Crops the largest centered part with the aspect ratio height : width."""
  rows, columns = pixels.shape[:2]
  keep_rows = min(rows, max(1, round(columns * height / width)))
  keep_columns = min(columns, max(1, round(rows * width / height)))
  top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
  return pixels[top : top + keep_rows, left : left + keep_columns]


def fitted(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """Crops and resizes pixels uint8 [h, w, C] to [height, width, C].

  Square outputs use the resizing of ADM's training images (Dhariwal & Nichol,
  2021), others bicubic interpolation.
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
  """Computes the mean opacity per pixel in [0, 1]: [height, width].

  Crops as `fitted`, so that a mask remains aligned with its image.

  Args:
    alpha: uint8 [h, w].
    height, width: output size.
  """
  part = PIL.Image.fromarray(middle(alpha, height, width))
  small = part.resize((width, height), PIL.Image.Resampling.BOX)
  return np.asarray(small) / 255.0


def read_image(
    content: bytes, name: str, shape: tuple[int, int, int], resize: bool,
    any_colors: bool = False,
) -> np.ndarray:
  """Reads an image file as uint8 [H, W, C].

  Args:
    content: bytes of the file.
    name: name of the file, for errors.
    shape: expected (H, W, C).
    resize: convert other sizes and channels, see `fitted`.
    any_colors: accept gray files as RGB and color files as gray.

  Raises:
    UserError: unreadable, or another shape without `resize`.
  """
  height, width, channels = shape
  picture = open_picture(content, name)
  pixels = pixels_of(picture, channels)
  if resize:
    return fitted(pixels, height, width)
  if pixels.shape[:2] != (height, width):
    raise errors.UserError(
        f"{name}: got {pixels.shape[0]}x{pixels.shape[1]} pixels (height x "
        f"width), expected {height}x{width}; {_RESIZE_HINT}"
    )
  is_gray = picture.mode in ("1", "L", "LA")
  if is_gray != (channels == 1) and not any_colors:
    raise errors.UserError(
        f"{name}: got a {'gray' if is_gray else 'color'} image, expected "
        f"{channels} channel{'s' if channels > 1 else ''}; {_RESIZE_HINT}"
    )
  return pixels


def read_mask(
    content: bytes, name: str, shape: tuple[int, int, int], resize: bool
) -> np.ndarray:
  """Reads a mask file as bool [H, W], true where it is white.

  Raises:
    UserError: unreadable, another size, or all black.
  """
  height, width, _ = shape
  gray = pixels_of(open_picture(content, name), 1)[..., 0]
  if gray.shape != (height, width) and not resize:
    raise errors.UserError(
        f"{name}: got a mask of {gray.shape[0]}x{gray.shape[1]} pixels, "
        f"expected {height}x{width}; {_RESIZE_HINT}"
    )
  mask = covered_share(gray, height, width) >= 0.5
  if not mask.any():
    raise errors.UserError(
        f"{name}: got a mask without a hole, expected white pixels; paint the "
        "pixels to fill white"
    )
  return mask


# Test images ----------------------------------------------------------------


def _degraded_inputs(experiment, section: schema.Edit) -> Inputs:
  """Draws images of the test split and degrades them for the task."""
  source = experiment.source("test")
  ends, key = (2, "pairs") if section.task == "interpolate" else (
      1, "num_images"
  )
  count, most = getattr(section, key), len(source) // ends
  if not 1 <= count <= most:
    raise errors.UserError(
        f"edit.{key}: got {count}, expected 1 to {most}, the size of the test "
        "split"
    )
  file_keys = {"end_images": section.end_images, "reference": section.reference}
  if experiment.num_classes is not None and section.task != "attribute":
    file_keys["label"] = section.label or None
  for key, value in file_keys.items():
    if value is not None:
      raise errors.UserError(
          f"edit.{key}: got {value}, expected None for test images; set "
          "edit.input or omit it"
      )
  order = np.random.default_rng(section.seed).permutation(len(source))
  batch = source.fetch(order[:count])
  images = batch["image"]
  labels = None if experiment.num_classes is None else batch["label"]
  inputs = Inputs(
      [f"{i:05d}" for i in order[:count]], images, labels, images
  )
  if section.task == "interpolate":
    other = source.fetch(order[count : 2 * count])
    inputs.second, inputs.reference = other["image"], None
    inputs.second_labels = None if labels is None else other["label"]
  elif section.task.startswith("inpaint"):
    inputs.mask = _mask(section, experiment.image_shape, len(images))
    inputs.images = covered(images, inputs.mask)
  elif section.task == "denoise":
    _add_noise(inputs, section)
  elif section.task == "colorize":
    inputs.images = image_source.to_uint8(
        np.asarray(zero_shot.to_gray(image_source.to_float(images)))
    )
  elif section.task == "super_resolve":
    inputs.images = image_source.to_uint8(
      np.asarray(
        zero_shot.shrink(image_source.to_float(images), section.factor)
      )
    )
  elif section.task == "restore":
    inputs.images = np.stack([compress(i, section.quality) for i in images])
  elif section.task == "stroke":
    small = zero_shot.shrink(image_source.to_float(images), 2)
    inputs.images = image_source.to_uint8(
      np.asarray(zero_shot.enlarge(small, 2))
    )
  elif section.task in ("relabel", "attribute"):
    inputs.reference = None
  return inputs


def _add_noise(inputs: Inputs, section: schema.Edit) -> None:
  """Adds white noise: `exact` in float32, `images` clipped to uint8."""
  level = _NOISE if section.sigma is None else section.sigma
  noise = np.random.default_rng(section.seed).standard_normal(
    inputs.images.shape
  )
  exact = image_source.to_float(inputs.images) + level * noise
  inputs.exact = exact.astype(np.float32)
  inputs.images = image_source.to_uint8(inputs.exact)


def compress(image: np.ndarray, quality: int) -> np.ndarray:
  """Compresses and decodes an image uint8 [H, W, C] as JPEG."""
  plane = image[..., 0] if image.shape[-1] == 1 else image
  content = io.BytesIO()
  PIL.Image.fromarray(plane).save(content, "JPEG", quality=quality)
  return decoding.Decoder(image.shape[-1])(content.getvalue(), "JPEG")


# Groups ---------------------------------------------------------------------


def read_folder(experiment, path: str, key: str) -> np.ndarray:
  """Reads all images of a folder as uint8 [n, H, W, C], the network's shape."""
  resize = experiment.config.edit.resize
  return _read(listing(path, key), experiment.image_shape, resize)


def of_class(experiment, label: int, most: int) -> np.ndarray:
  """Draws at most `most` training images of a class: uint8 [n, H, W, C].

  Raises:
    UserError: the class has no images.
  """
  source = experiment.source("train")
  order = np.random.default_rng(0).permutation(len(source))
  blocks, missing = [], most
  for first in range(0, len(order), _BLOCK):
    batch = source.fetch(order[first : first + _BLOCK])
    blocks.append(batch["image"][batch["label"] == label][:missing])
    missing -= len(blocks[-1])
    if not missing:
      break
  if missing == most:
    raise errors.UserError(
        f"edit.label, edit.new_label: got {label}, expected a class of the "
        "training images"
    )
  return np.concatenate(blocks)
