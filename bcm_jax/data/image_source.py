"""Random-access image sources, and the two roads between uint8 and [-1, 1].

A source hands out examples by index, in any order, as often as asked: this is
what lets a batch be a pure function of (seed, step) (see `pipeline`).
"""

from typing import Protocol

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.utils import hashing


class Source(Protocol):
  """Examples 0 .. len - 1, each a uint8 image with a label.

  Attributes:
    name: shown in error messages, for example 'digits/train'.
    image_shape: (H, W, C) of every image.
    num_classes: labels lie in [0, num_classes); None if there are no classes.
  """

  name: str
  image_shape: tuple[int, int, int]
  num_classes: int | None

  def __len__(self) -> int:
    """Returns the number of examples."""

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    From several threads; the arrays are the caller's to change.
    """


class ArraySource:
  """A `Source` held in memory.

  Args:
    images: uint8 [n, H, W, C], n >= 1.
    labels: integers [n] in [0, num_classes), or None for all zero.
    num_classes: the number of classes, or None if there are none.
    name: shown in error messages.

  Raises:
    UserError: no example, images that are not uint8 NHWC, labels of the wrong
      length or type, or a label out of range (the first such one is named).
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
    self._labels = labels.astype(np.int32)

  def __len__(self) -> int:
    return len(self._images)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    Args:
      indices: integers [n] in [0, len(self)), repeats allowed.

    Raises:
      IndexError: an index outside of that range.
    """
    indices = np.asarray(indices)
    # NumPy would read a negative index from the end: a wrong example, silently.
    if indices.size and indices.min() < 0:
      raise IndexError(f"{self.name}: negative index {indices.min()}")
    return dict(image=self._images[indices], label=self._labels[indices])


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
  """Checks that labels lie in [0, num_classes).

  Args:
    labels: integers [n].
    examples: integers [n], the example ids to name in the error.
    num_classes: the number of classes; None allows any label >= 0.
    name: of the source.

  Raises:
    UserError: names the first label out of range, its example and the range.
  """
  limit = np.inf if num_classes is None else num_classes
  wrong = np.flatnonzero((labels < 0) | (labels >= limit))
  if wrong.size:
    first = wrong[0]
    expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
    raise UserError(
      f"{name}: example {examples[first]} has label {labels[first]}, expected"
      f" {expected} ({wrong.size} of {labels.size} are out of range); correct"
      " the labels or the number of classes"
    )


# Examples that a fingerprint reads.
_WITNESSES = 32


def fingerprint(source: Source) -> str:
  """Returns twelve hex digits that identify a dataset, without reading all of
  it.

  They depend on number, shape and classes of the images, and on pixels and
  labels of a few spread over the set. Moving the dataset keeps them; a change
  of one other image is not detected.
  """
  count = len(source)
  ids = np.unique(np.linspace(0, count - 1, _WITNESSES).round().astype(int))
  examples = source.fetch(ids)
  facts = (count, tuple(source.image_shape), source.num_classes)
  return hashing.arrays_digest([
      (repr(facts), examples["image"]),
      ("", np.asarray(examples["label"], np.int32)),
  ])[:12]


def to_uint8(image: np.ndarray) -> np.ndarray:
  """Maps [-1, 1] to uint8 by floor(clip((x + 1) * 127.5, 0, 255)).

  The flooring and the float32 arithmetic are those of the official samplers
  (consistency_models and BCM, `image_sample.py`), so that saved samples and
  reconstruction errors are comparable with published ones.

  Args:
    image: floating point, any shape; values outside of [-1, 1] are clipped.

  Returns:
    uint8 of the same shape.
  """
  scaled = (np.asarray(image, np.float32) + np.float32(1)) * np.float32(127.5)
  return np.floor(np.clip(scaled, 0, 255)).astype(np.uint8)


# Plain v / 127.5 - 1 rounds some of v = 1 .. 63 to just below the value that
# `to_uint8` needs, whose floor would then lose a grey level on every trip. With
# this much added the result is the same float32 or, for those, the next one.
_NUDGE = np.float32(2**-18)


def to_float(image: np.ndarray) -> np.ndarray:
  """Maps uint8 to float32 in [-1, 1], x / 127.5 - 1; `to_uint8` undoes it.

  Args:
    image: uint8, any shape.

  Returns:
    float32 of the same shape.

  Raises:
    UserError: the image is not uint8.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8:
    raise UserError(
      f"to_float was given {image.dtype}, expected uint8; images that are"
      " floats already need no conversion"
    )
  value = image.astype(np.float32)
  return (value + (value > 0) * _NUDGE) / np.float32(127.5) - np.float32(1)
