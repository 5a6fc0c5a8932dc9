"""Random-access image sources, and conversion between uint8 and [-1, 1].

A source returns examples by index, in any order and any number of times, so
that a batch is a pure function of (seed, step) (see `pipeline`).
"""

from typing import Protocol

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.utils import hashing


class Source(Protocol):
  """Random-access source of uint8 images with labels.

  Attributes:
    name: name for error messages, for example 'digits/train'.
    image_shape: (H, W, C) of every image.
    num_classes: labels are in [0, num_classes); None without labels.
  """

  name: str
  image_shape: tuple[int, int, int]
  num_classes: int | None

  def __len__(self) -> int:
    """Returns the number of examples."""

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    Thread-safe. Returns new arrays, which the caller may modify.

    Args:
      indices: integers [n] in [0, len(self)), repeats allowed.
    """


class ArraySource:
  """In-memory image source.

  Args:
    images: uint8 [n, H, W, C], n >= 1.
    labels: integers [n] in [0, num_classes); None sets all labels to 0.
    num_classes: number of classes; None without labels.
    name: name for error messages.

  Attributes:
    labels: int32 [n].

  Raises:
    UserError: no images, images that are not uint8 NHWC, labels of the wrong
      length or dtype, or a label out of range (names the first one).
  """

  def __init__(
      self,
      images: np.ndarray,
      labels: np.ndarray | None = None,
      num_classes: int | None = None,
      name: str = "array",
  ):
    images = np.asarray(images)
    if labels is None:
      labels = np.zeros(images.shape[:1], np.int32)
    labels = np.asarray(labels)
    check_images(images, name)
    check_label_array(labels, len(images), name)
    check_labels(labels, np.arange(len(labels)), num_classes, name)
    self.name = name
    self.num_classes = num_classes
    self.image_shape = tuple(int(size) for size in images.shape[1:])
    self._images = images
    self.labels = labels.astype(np.int32)

  def __len__(self) -> int:
    return len(self._images)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    Args:
      indices: integers [n] in [0, len(self)), repeats allowed.

    Raises:
      IndexError: an index is out of range.
    """
    indices = np.asarray(indices)
    # NumPy indexes from the end for negative values: silently a wrong example.
    if indices.size and indices.min() < 0:
      raise IndexError(f"{self.name}: negative index {indices.min()}")
    return dict(image=self._images[indices], label=self.labels[indices])


def check_images(images: np.ndarray, name: str) -> np.ndarray:
  """Returns images as an array.

  Raises:
    UserError: not uint8 [n, H, W, C] with n >= 1.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
    raise UserError(
      f"{name}: got {images.dtype} of shape {images.shape}, expected uint8 "
      "images [n, H, W, C] with n >= 1 (grey images have C = 1); convert them, "
      "for example with bcm_jax.data.image_source.to_uint8 from [-1, 1]"
    )
  return images


def check_label_array(labels: np.ndarray, n: int, name: str) -> np.ndarray:
  """Returns labels as an array.

  Raises:
    UserError: not integers [n].
  """
  labels = np.asarray(labels)
  if labels.shape != (n,) or labels.dtype.kind not in "iu":
    raise UserError(
      f"{name}: got labels {labels.dtype} of shape {labels.shape}, expected"
      f" integers of shape ({n},), one per image; check the labels"
    )
  return labels


def check_labels(
  labels: np.ndarray,
  examples: np.ndarray,
  num_classes: int | None,
  name: str,
) -> None:
  """Checks that labels are in [0, num_classes).

  Args:
    labels: integers [n].
    examples: integers [n], example ids for the error message.
    num_classes: number of classes; None accepts any label >= 0.
    name: name of the source, for the error message.

  Raises:
    UserError: a label is out of range; names the first one and its example.
  """
  limit = np.inf if num_classes is None else num_classes
  wrong = np.flatnonzero((labels < 0) | (labels >= limit))
  if wrong.size:
    first = wrong[0]
    expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
    raise UserError(
      f"{name}: got label {labels[first]} of example {examples[first]},"
      f" expected {expected} ({wrong.size} of {labels.size} are out of range);"
      " correct the labels or data.num_classes"
    )


# Number of examples that `fingerprint` reads.
_FINGERPRINT_EXAMPLES = 32


def fingerprint(source: Source) -> str:
  """Computes a fast fingerprint of a dataset.

  Hashes the number, shape and number of classes of the images, and the pixels
  and labels of 32 evenly spaced examples. It does not depend on the path, and
  does not detect changes of other examples.

  Returns:
    The first 12 hex digits of a SHA-256 digest.
  """
  count = len(source)
  spaced = np.linspace(0, count - 1, _FINGERPRINT_EXAMPLES)
  ids = np.unique(spaced.round().astype(int))
  examples = source.fetch(ids)
  facts = (count, tuple(source.image_shape), source.num_classes)
  return hashing.arrays_digest([
      (repr(facts), examples["image"]),
      ("", np.asarray(examples["label"], np.int32)),
  ])[:12]


def to_uint8(image: np.ndarray, rounding: str = "floor") -> np.ndarray:
  """Maps [-1, 1] to uint8, as the released samplers in float32 arithmetic.

  'floor' is floor(clip((x + 1) * 127.5, 0, 255)) (consistency_models and BCM,
  `image_sample.py`); 'nearest' is floor(clip(x * 127.5 + 128, 0, 255)) (EDM and
  EDM2), half a gray level brighter on average. Saved samples and reconstruction
  errors are then comparable with published ones.

  Args:
    image: floating point, any shape; values outside [-1, 1] are clipped.
    rounding: 'floor' or 'nearest', such as `Method.rounding`.

  Returns:
    uint8 of the same shape.

  Raises:
    UserError: values that are not finite.
  """
  image, half = np.asarray(image, np.float32), np.float32(127.5)
  scaled = {
      "floor": lambda: (image + np.float32(1)) * half,
      "nearest": lambda: image * half + np.float32(128),
  }[rounding]()
  if not np.isfinite(scaled).all():
    raise UserError(
        "images: got values that are not finite, expected numbers around -1 to "
        "1; the network has diverged, use an earlier checkpoint or other noise "
        "levels"
    )
  return np.floor(np.clip(scaled, 0, 255)).astype(np.uint8)


# In float32, v / 127.5 - 1 is rounded down for some v in 1 .. 63, and the floor
# in `to_uint8` would then return v - 1. Adding this constant rounds those
# values up to the next float32 and does not change the others.
_NUDGE = np.float32(2**-18)


def to_float(image: np.ndarray) -> np.ndarray:
  """Maps uint8 to float32 in [-1, 1] by x / 127.5 - 1, inverse of `to_uint8`.

  Args:
    image: uint8, any shape.

  Returns:
    float32 of the same shape.

  Raises:
    UserError: the image does not have dtype uint8.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8:
    raise UserError(
      f"image: got {image.dtype}, expected uint8; do not convert images that"
      " are already floating point"
    )
  value = image.astype(np.float32)
  return (value + (value > 0) * _NUDGE) / np.float32(127.5) - np.float32(1)
