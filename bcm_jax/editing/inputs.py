"""What mode edit works on: image files, or test images with damage done."""

import dataclasses
import io
import os

import numpy as np
import PIL.Image

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.data import decoding
from bcm_jax.data import folder as folders
from bcm_jax.data import image_source
from bcm_jax.editing import image_reading
from bcm_jax.sampling import zero_shot


@dataclasses.dataclass
class Inputs:
  """Images for a task.

  Attributes:
    names: [n], of files, or numbers in the test split.
    images: uint8 [n, H, W, C], what is edited; 'super_resolve' has them small.
    labels: [n] or None.
    reference: uint8 [n, H, W, C] as they should come out, or None.
    exact: float32 in place of `images`, where 8 bits would clip noise.
    mask: bool [n, H, W] or [H, W], true in the holes, of inpainting.
    second: uint8, the other ends of 'interpolate'.
    second_labels: their classes.
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
  """The images of section edit.

  Raises:
    UserError: files that are not there, unreadable or do not fit.
  """
  section = experiment.edit
  _check(experiment, section)
  if section.input is None:
    return _damaged(experiment, section)
  return _files(experiment, section)


def _check(experiment, section: schema.Edit) -> None:
  """Numbers that would go wrong far from here."""
  height, width, _ = experiment.image_shape
  factor = section.factor
  if section.task == "super_resolve" and (
      factor < 2 or height % factor or width % factor
  ):
    raise errors.UserError(
        f"edit.factor={factor} does not divide {height}x{width} pixels; give "
        "one that does, at least 2"
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
  """The image files that a path means: itself, or those of a folder."""
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    raise errors.UserError(f"{what}={path} is not there; give a file or folder")
  found = sorted(
      entry.path for entry in os.scandir(path)
      if entry.name.lower().endswith(folders.EXTENSIONS)
      and entry.name[0] != "." and entry.is_file()
  )
  if not found:
    raise errors.UserError(
        f"{what}={path} holds no images ({', '.join(folders.EXTENSIONS)})"
    )
  return found


def _read(paths, shape, resize, any_colours=False) -> np.ndarray:
  images = []
  for path in paths:
    images.append(image_reading.read_image(
        _content(path), path, shape, resize, any_colours
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
  wanted = shape
  if section.task == "super_resolve":
    k = section.factor
    wanted = (shape[0] // k, shape[1] // k, shape[2])
  images = _read(paths, wanted, resize, section.task == "colorize")
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
          "name "
          "the second image or folder"
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
  """Names of results: of the files, with their kind where it tells them apart.
  """
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
  """Holes: of files, or a square in the middle."""
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
        image_reading.read_mask(_content(path), path, shape, section.resize)
    )
  return masks[0] if len(masks) == 1 else np.stack(masks)


def covered(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Images with grey holes, mask true in them."""
  hole = np.broadcast_to(mask, images.shape[:3])[..., None]
  return np.where(hole, np.uint8(127), images)


def labels_of(
    experiment, section: schema.Edit, count: int
) -> np.ndarray | None:
  """Classes of files' images, from edit.label; 0 until they are found."""
  given = section.label
  if experiment.num_classes is None:
    return None
  if section.predict_labels and given:
    raise errors.UserError(
        f"edit.label={given} names classes, and edit.predict_labels has them "
        f"found; "
        "leave one of the two out"
    )
  if section.predict_labels:
    given = (0,)
  if len(given) not in (1, count):
    raise errors.UserError(
        f"edit.label={given}: this network wants the classes of the images, 0 "
        f"to {experiment.num_classes - 1}; give one for all or {count}, or set "
        "edit.predict_labels=true to have them found"
    )
  return np.broadcast_to(np.asarray(given, np.int32), (count,)).copy()


# Test images ----------------------------------------------------------------


def _damaged(experiment, section: schema.Edit) -> Inputs:
  """Random test images, and what the task is to undo done to them."""
  source = experiment.source("test")
  ends, key = (2, "pairs") if section.task == "interpolate" else (
      1, "num_images"
  )
  count, most = getattr(section, key), len(source) // ends
  if not 1 <= count <= most:
    raise errors.UserError(
        f"edit.{key}={count}: the test split has enough for 1 to {most}"
    )
  theirs = {"second": section.end_images, "reference": section.reference}
  if experiment.num_classes is not None and section.task != "attribute":
    theirs["label"] = section.label or None
  for key, value in theirs.items():
    if value is not None:
      raise errors.UserError(
          f"edit.{key} goes with edit.input; test images bring their own"
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


# Noise of test images where edit.sigma does not say it.
_NOISE = 0.5


def _add_noise(inputs: Inputs, section: schema.Edit) -> None:
  level = _NOISE if section.sigma is None else section.sigma
  noise = np.random.default_rng(section.seed).standard_normal(
    inputs.images.shape
  )
  exact = image_source.to_float(inputs.images) + level * noise
  inputs.exact = exact.astype(np.float32)
  inputs.images = image_source.to_uint8(inputs.exact)


def compress(image: np.ndarray, quality: int) -> np.ndarray:
  """An image uint8 [H, W, C] after JPEG compression, by Pillow."""
  plane = image[..., 0] if image.shape[-1] == 1 else image
  content = io.BytesIO()
  PIL.Image.fromarray(plane).save(content, "JPEG", quality=quality)
  return decoding.Decoder(image.shape[-1])(content.getvalue(), "JPEG")


# Groups ---------------------------------------------------------------------


def read_folder(experiment, path: str, what: str) -> np.ndarray:
  """All images of a folder, as the network takes them: uint8 [n, H, W, C]."""
  resize = experiment.config.edit.resize
  return _read(listing(path, what), experiment.image_shape, resize)


def of_class(experiment, label: int, most: int) -> np.ndarray:
  """Training images of a class, at most so many: uint8 [n, H, W, C].

  Raises:
    UserError: there are none.
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


# Training images looked at together while those of a class are searched.
_BLOCK = 1000
