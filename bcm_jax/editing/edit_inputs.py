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

# No format that runs programs (as EPS does) or has no pixels.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB"}
_RESIZE_HINT = "set edit.resize=true to have it"
# Noise of test images if edit.sigma is None.
_NOISE = 0.5
# Training images read at a time by `of_class`.
_BLOCK = 1000


@dataclasses.dataclass
class Inputs:
  """Images of a task.

  Attributes:
    names: [n], of files, or indices in the test split.
    images: uint8 [n, H, W, C] to edit; smaller for 'super_resolve'.
    labels: [n] or None.
    reference: uint8 [n, H, W, C], the expected results, or None.
    exact: float32 in place of `images`, where 8 bits would clip noise.
    mask: bool [n, H, W] or [H, W], true in the holes, for inpainting.
    second: uint8, the second images of 'interpolate'.
    second_labels: classes of `second`.
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
    return _degraded_test_images(experiment, section)
  return _files(experiment, section)


def _check(experiment, section: schema.Edit) -> None:
  """Raises UserError for values out of range."""
  height, width, _ = experiment.image_shape
  factor = section.factor
  if section.task == "super_resolve" and (
      factor < 2 or height % factor or width % factor
  ):
    raise errors.UserError(
        f"edit.factor={factor} does not divide {height}x{width} pixels; give "
        "a divisor, at least 2"
    )
  for key, low, high in (
      ("seed", 0, 2**31 - 1), ("num_interpolants", 2, 1000), ("quality", 1, 95)
  ):
    value = getattr(section, key)
    if not low <= value <= high:
      raise errors.UserError(
          f"edit.{key}={value}; give a whole number from {low} to {high}"
      )


# Files ----------------------------------------------------------------------


def listing(path: str, what: str) -> list[str]:
  """Lists image files: the path itself, or those of a folder."""
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    raise errors.UserError(f"{what}={path} does not exist; give a file or "
                           f"folder")
  found = sorted(
      entry.path for entry in os.scandir(path)
      if entry.name.lower().endswith(folder.EXTENSIONS)
      and entry.name[0] != "." and entry.is_file()
  )
  if not found:
    raise errors.UserError(
        f"{what}={path} holds no images ({', '.join(folder.EXTENSIONS)})"
    )
  return found


def _read(paths, shape, resize, any_colors=False) -> np.ndarray:
  images = []
  for path in paths:
    images.append(read_image(
        _content(path), path, shape, resize, any_colors
    ))
  return np.stack(images)


def _content(path: str) -> bytes:
  try:
    with open(path, "rb") as f:
      return f.read()
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read ({e.strerror})") from e


def _files(experiment, section: schema.Edit) -> Inputs:
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
    inputs.reference = _as_many(
        section.reference, "edit.reference", len(paths), shape, resize
    )
  if section.task == "interpolate":
    if section.end_images is None:
      raise errors.UserError(
          "edit.task='interpolate' goes from edit.input to edit.end_images; "
          "name the second image or folder"
      )
    inputs.second = _as_many(
        section.end_images, "edit.end_images", len(paths), shape, resize
    )
    inputs.second_labels = inputs.labels
    if section.new_label is not None:
      inputs.second_labels = np.full(len(paths), section.new_label, np.int32)
  if section.task.startswith("inpaint"):
    inputs.mask = _mask(section, shape, len(paths))
  return inputs


def _names(paths: list[str]) -> list[str]:
  """Returns names of results; with the suffix of the files if needed."""
  files = [os.path.basename(p) for p in paths]
  names = [os.path.splitext(f)[0] for f in files]
  if len(set(names)) < len(names):
    return [f.replace(".", "_") for f in files]
  return names


def _as_many(path, what: str, count: int, shape, resize) -> np.ndarray:
  paths = listing(path, what)
  if len(paths) != count:
    raise errors.UserError(
        f"{what}={path} holds {len(paths)} images, and edit.input {count}; "
        "give as many, in the order of their names"
    )
  return _read(paths, shape, resize)


def _mask(section: schema.Edit, shape, count: int) -> np.ndarray:
  """Reads masks from files; without files a central square."""
  if section.mask is None:
    mask = np.zeros(shape[:2], bool)
    height, width = shape[:2]
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    return mask
  paths = listing(section.mask, "edit.mask")
  if len(paths) not in (1, count):
    raise errors.UserError(
        f"edit.mask={section.mask} holds {len(paths)} images; give one, or "
        f"{count} as edit.input"
    )
  masks = []
  for path in paths:
    masks.append(
        read_mask(_content(path), path, shape, section.resize)
    )
  return masks[0] if len(masks) == 1 else np.stack(masks)


def covered(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns images with grey holes where mask is true."""
  hole = np.broadcast_to(mask, images.shape[:3])[..., None]
  return np.where(hole, np.uint8(127), images)


def labels_of(
    experiment, section: schema.Edit, count: int
) -> np.ndarray | None:
  """Returns classes from edit.label; 0 if they will be predicted."""
  labels = section.label
  if experiment.num_classes is None:
    return None
  if section.predict_labels and labels:
    raise errors.UserError(
        f"edit.label={labels} and edit.predict_labels=true exclude each other; "
        "omit one of the two"
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
    content: of the file.
    name: for errors.
    most_pixels: larger images are rejected before decoding.

  Raises:
    UserError: not an image of `FORMATS`, truncated, or too large.
  """
  try:
    picture = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = picture.size
    if most_pixels is None or width * height <= most_pixels:
      picture.load()
      picture = PIL.ImageOps.exif_transpose(picture)
  except Exception as e:  # PIL raises various exceptions for bad files.
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
        f"{name} has more than 8 bits per channel; save it as an 8-bit image"
    )
  return picture


def pixels_of(picture: PIL.Image.Image, channels: int) -> np.ndarray:
  """Converts a picture to uint8 [H, W, C]; transparency is dropped.

  Raises:
    UserError: a number of channels other than 1 and 3.
  """
  if channels not in _MODES:
    raise errors.UserError(
        f"the network generates images of {channels} channels; files have 1 or "
        "3"
    )
  if "transparency" in picture.info:
    picture = picture.convert("RGBA")  # PIL would warn otherwise.
  array = np.array(picture.convert(_MODES[channels]))
  return array.reshape(*array.shape[:2], channels)


def middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """Crops the largest centered part with the aspect of height x width."""
  rows, columns = pixels.shape[:2]
  keep_rows = min(rows, max(1, round(columns * height / width)))
  keep_columns = min(columns, max(1, round(rows * width / height)))
  top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
  return pixels[top : top + keep_rows, left : left + keep_columns]


def fitted(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  """Crops and resizes pixels uint8 [h, w, C] to [height, width, C].

  Squares are resized as ADM's training images.
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
  """Returns the white share of each pixel of [h, w] in 0..255: [height, width].

  Cropped as by `fitted`, so that a mask stays aligned with its image.
  """
  part = PIL.Image.fromarray(middle(alpha, height, width))
  small = part.resize((width, height), PIL.Image.Resampling.BOX)
  return np.asarray(small) / 255.0


def read_image(
    content: bytes, name: str, shape: tuple[int, int, int], resize: bool,
    any_colors: bool = False,
) -> np.ndarray:
  """Reads an image file as uint8 of a shape.

  Args:
    content: of the file.
    name: for errors.
    shape: expected (H, W, C).
    resize: convert other sizes and channels, see `fitted`.
    any_colors: accept grey files as RGB and color files as grey.

  Raises:
    UserError: unreadable, or of another shape without `resize`.
  """
  height, width, channels = shape
  picture = open_picture(content, name)
  pixels = pixels_of(picture, channels)
  if resize:
    return fitted(pixels, height, width)
  if pixels.shape[:2] != (height, width):
    raise errors.UserError(
        f"{name} is {pixels.shape[0]}x{pixels.shape[1]} pixels (height x "
        f"width), and the network takes {height}x{width}; {_RESIZE_HINT} "
        f"resized and "
        "cropped"
    )
  grey = picture.mode in ("1", "L", "LA")
  if grey != (channels == 1) and not any_colors:
    kind = "grey" if grey else "coloured"
    raise errors.UserError(
        f"{name} is {kind}, and the network takes images of {channels} "
        f"channel{'s' if channels > 1 else ''}; {_RESIZE_HINT} converted"
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
  grey = pixels_of(open_picture(content, name), 1)[..., 0]
  if grey.shape != (height, width) and not resize:
    raise errors.UserError(
        f"the mask {name} is {grey.shape[0]}x{grey.shape[1]}, expected "
        f"{height}x{width}; {_RESIZE_HINT} resized"
    )
  mask = covered_share(grey, height, width) >= 0.5
  if not mask.any():
    raise errors.UserError(
        f"the mask {name} has no hole; paint the pixels to fill white"
    )
  return mask


# Test images ----------------------------------------------------------------


def _degraded_test_images(experiment, section: schema.Edit) -> Inputs:
  """Draws test images and degrades them as the task requires."""
  source = experiment.source("test")
  ends, key = (2, "pairs") if section.task == "interpolate" else (
      1, "num_images"
  )
  count, most = getattr(section, key), len(source) // ends
  if not 1 <= count <= most:
    raise errors.UserError(
        f"edit.{key}={count}: the test split has enough for 1 to {most}"
    )
  file_keys = {"end_images": section.end_images, "reference": section.reference}
  if experiment.num_classes is not None and section.task != "attribute":
    file_keys["label"] = section.label or None
  for key, value in file_keys.items():
    if value is not None:
      raise errors.UserError(
          f"edit.{key} requires edit.input; test images have their own"
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
        np.asarray(zero_shot.to_grey(image_source.to_float(images)))
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
  level = _NOISE if section.sigma is None else section.sigma
  noise = np.random.default_rng(section.seed).standard_normal(
    inputs.images.shape
  )
  exact = image_source.to_float(inputs.images) + level * noise
  inputs.exact = exact.astype(np.float32)
  inputs.images = image_source.to_uint8(inputs.exact)


def compress(image: np.ndarray, quality: int) -> np.ndarray:
  """Compresses an image uint8 [H, W, C] as JPEG, by Pillow."""
  plane = image[..., 0] if image.shape[-1] == 1 else image
  content = io.BytesIO()
  PIL.Image.fromarray(plane).save(content, "JPEG", quality=quality)
  return decoding.Decoder(image.shape[-1])(content.getvalue(), "JPEG")


# Groups ---------------------------------------------------------------------


def read_folder(experiment, path: str, what: str) -> np.ndarray:
  """Reads all images of a folder for the network: uint8 [n, H, W, C]."""
  resize = experiment.config.edit.resize
  return _read(listing(path, what), experiment.image_shape, resize)


def of_class(experiment, label: int, most: int) -> np.ndarray:
  """Returns at most `most` training images of a class: uint8 [n, H, W, C].

  Raises:
    UserError: the class has no images.
  """
  source = experiment.source("train")
  order = np.random.default_rng(0).permutation(len(source))
  found, missing = [], most
  for first in range(0, len(order), _BLOCK):
    batch = source.fetch(order[first : first + _BLOCK])
    found.append(batch["image"][batch["label"] == label][:missing])
    missing -= len(found[-1])
    if not missing:
      break
  if missing == most:
    raise errors.UserError(f"there are no training images of class {label}")
  return np.concatenate(found)
