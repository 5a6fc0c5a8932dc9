"""Data sets by name: what their images are like, and how to open them."""

from collections.abc import Callable
import os

from bcm_jax import errors
from bcm_jax.data import decoding
from bcm_jax.data import digits
from bcm_jax.data import edm_zip
from bcm_jax.data import folder
from bcm_jax.data import image_source
from bcm_jax.data import npz_file
from bcm_jax.data.dataset_spec import DataSet

# Found by data.path.
FILES = ("folder", "npz", "zip", "prepared")
# Found by TFDS: pixels a side, classes.
PUBLISHED = {
    "cifar10": (32, 10), "imagenet64": (64, 1000), "imagenet2012": (64, 1000),
}
NAMES = ("digits", *PUBLISHED, *FILES, "none")


def find(
    name: str,
    image_shape: tuple[int, ...] = (),
    num_classes: int | None = None,
    path: str | None = None,
    size: int | None = None,
    crop: str = "adm",
    skip_corrupt: bool = False,
    channels: int = 3,
    threads: int | None = None,
) -> DataSet:
  """The data set of a name; no more is read than describes it.

  Args:
    name: one of NAMES.
    image_shape, num_classes: of 'none', which knows neither; of a name in
      FILES what is expected there, () for anything.
    path: of a name in FILES, which is described by what is there.
    size: pixels a side that images are resized to; None keeps theirs (64 for
      'imagenet2012', whose images differ in size).
    crop: how, a key of `resizing.BY_NAME`.
    skip_corrupt: of 'folder' and 'zip': leave out files that cannot be
      decoded, after decoding every one once.
    channels: 3 or 1, of images that are decoded (folder, zip, TFDS).
    threads: that decode and resize; None is one a core.

  Raises:
    UserError: unknown name, a key that does not go with it, files that are not
      as they should be, or 'none' without a shape.
  """
  if name not in NAMES:
    raise errors.unknown_name("data.name", name, NAMES)
  _check_keys(name, path, skip_corrupt)
  decoder = decoding.Decoder(channels, size, crop)
  if name in PUBLISHED:
    return _published(name, decoder, threads)
  if name in FILES:
    if image_shape and not os.path.exists(os.path.expanduser(path)):
      return DataSet(
          tuple(image_shape), num_classes, _not_here(path), splits=()
      )
    found = _in_files(name, path, decoder, skip_corrupt, threads)
    return _as_described(found, path, tuple(image_shape), num_classes)
  if name == "digits":
    found = DataSet((8, 8, 1), digits.NUM_CLASSES, digits.digits)
    return _of_size(found, name, size)
  if len(image_shape) != 3:
    raise errors.UserError(
        f"data.image_shape={image_shape} must be (height, width, channels) "
        "with data.name='none'"
    )
  return DataSet(tuple(image_shape), num_classes, _no_images, splits=())


def _check_keys(name: str, path: str | None, skip_corrupt: bool) -> None:
  if name in FILES and not path:
    raise errors.UserError(
        f"data.path is missing; data.name={name!r} needs the path of the images"
    )
  if path and name not in FILES:
    raise errors.UserError(
        f"data.path={path!r} does not go with data.name={name!r}; leave it out,"
        f" or set data.name to one of {', '.join(FILES)}"
    )
  if skip_corrupt and name not in ("folder", "zip"):
    raise errors.UserError(
        f"data.skip_corrupt=True does not go with data.name={name!r}; leave it"
        " out, it is for 'folder' and 'zip'"
    )


def _not_here(path: str) -> Callable[[str, str | None], image_source.Source]:
  def open_split(split, data_dir=None):
    raise errors.UserError(
        f"data.path={path!r} is not there, and images of split {split!r} are "
        "needed; correct the path"
    )

  return open_split


def _as_described(
    found: DataSet, path: str, image_shape: tuple, num_classes: int | None
) -> DataSet:
  """Checks that files hold what the config says of them, if it does."""
  there = (tuple(found.image_shape), found.num_classes)
  if image_shape and there != (image_shape, num_classes):
    raise errors.UserError(
        f"{path} holds images {there[0]} of {there[1] or 'no'} classes, but "
        f"data.image_shape={image_shape} and data.num_classes={num_classes}; "
        "correct the path or these (() and none take what is there)"
    )
  return found


def _in_files(
    name: str,
    path: str,
    decoder: decoding.Decoder,
    skip_corrupt: bool,
    threads: int | None,
) -> DataSet:
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise errors.UserError(f"data.path={path!r} is not there; correct the path")
  if name == "folder":
    return folder.data_set(path, decoder, skip_corrupt, threads)
  if name == "zip":
    return edm_zip.data_set(path, decoder, skip_corrupt, threads)
  if name == "npz":
    return npz_file.data_set(path, decoder.size, decoder.crop, threads)
  from bcm_jax.data import prepared  # Only here is array_record needed.

  return _of_size(prepared.data_set(path), name, decoder.size)


def _of_size(found: DataSet, name: str, size: int | None) -> DataSet:
  """Checks the size of images that are not resized."""
  height, width, _ = found.image_shape
  if size is not None and (height, width) != (size, size):
    raise errors.UserError(
        f"data.size={size} does not go with data.name={name!r}, whose images"
        f" are {height}x{width}; leave it out, or prepare the images anew with"
        f" --size={size}"
    )
  return found


def _published(
    name: str, decoder: decoding.Decoder, threads: int | None
) -> DataSet:
  size, num_classes = PUBLISHED[name]
  decoder = decoding.Decoder(
      decoder.channels, decoder.size or size, decoder.crop
  )
  shape = (decoder.size, decoder.size, decoder.channels)

  def open_split(split, data_dir):
    try:
      from bcm_jax.data import published_tfds
    except ImportError as e:
      raise errors.UserError(
          f"data.name={name!r} is read through TensorFlow Datasets, which is "
          f"not installed here ({e}); install tensorflow and "
          "tensorflow-datasets"
      ) from e
    return published_tfds.TFDSSource(
        name, split, num_classes, decoder, data_dir, threads
    )

  return DataSet(shape, num_classes, open_split)


def _no_images(split, data_dir):
  raise errors.UserError(
      f"data.name='none' has no images of split {split!r}; it serves to sample "
      "from converted weights. Set data.name to a data set"
  )
