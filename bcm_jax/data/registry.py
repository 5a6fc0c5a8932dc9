"""Data sets by name: what their images are like, and how to open them."""

from collections.abc import Callable
from typing import NamedTuple

from bcm_jax import errors
from bcm_jax.data import digits
from bcm_jax.data import source as sources


class DataSet(NamedTuple):
  """A data set that need not be there to be described.

  Attributes:
    image_shape: (H, W, C) of every image.
    num_classes: labels lie in [0, num_classes); None if there are none.
    open: (split, data_dir) -> source of that split.
  """

  image_shape: tuple[int, int, int]
  num_classes: int | None
  open: Callable[[str, str | None], sources.Source]


def _published(name: str, size: int, num_classes: int) -> DataSet:
  shape = (size, size, 3)

  def open_split(split, data_dir):
    try:
      from bcm_jax.data import published_tfds
    except ImportError as e:
      raise errors.UserError(
          f"data.name={name!r} is read through TensorFlow Datasets, which is "
          f"not installed here ({e}); install tensorflow and "
          "tensorflow-datasets"
      ) from e
    return published_tfds.TFDSSource(name, split, shape, num_classes, data_dir)

  return DataSet(shape, num_classes, open_split)


def _no_images(split, data_dir):
  raise errors.UserError(
      f"data.name='none' has no images of split {split!r}; it serves to sample "
      "from converted weights. Set data.name to a data set"
  )


NAMES = ("digits", "cifar10", "imagenet64", "none")


def find(
    name: str,
    image_shape: tuple[int, ...] = (),
    num_classes: int | None = None,
) -> DataSet:
  """The data set of a name; nothing is read.

  Args:
    name: one of NAMES.
    image_shape, num_classes: of 'none', which knows neither.

  Raises:
    UserError: unknown name, or 'none' without a shape.
  """
  if name == "digits":
    return DataSet((8, 8, 1), digits.NUM_CLASSES, digits.digits)
  if name == "cifar10":
    return _published(name, 32, 10)
  if name == "imagenet64":
    return _published(name, 64, 1000)
  if name != "none":
    raise errors.unknown_name("data.name", name, NAMES)
  if len(image_shape) != 3:
    raise errors.UserError(
        f"data.image_shape={image_shape} must be (height, width, channels) "
        "with data.name='none'"
    )
  return DataSet(tuple(image_shape), num_classes, _no_images)
