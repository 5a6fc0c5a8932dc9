"""Dataset registry: maps data.name to a dataset specification."""

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

# Datasets read from data.path.
FILES = ("folder", "npz", "zip", "prepared")
# Datasets read through TFDS: name -> (resolution, number of classes).
PUBLISHED = {
    "cifar10": (32, 10), "imagenet64": (64, 1000), "imagenet2012": (64, 1000),
}
CLASSES_HINT = (
    "; classes are read from class folders, dataset.json, metadata.jsonl or"
    " metadata.csv, or from file names such as cat_1.png with data.labels=name"
)
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
    labels: str = "auto",
) -> DataSet:
  """Returns the dataset specification without reading all images.

  Args:
    name: one of NAMES.
    image_shape, num_classes: required for 'none'; for a name in FILES the
      expected values, checked against the files (() skips the check).
    path: file or folder of a dataset in FILES.
    size: height and width to resize to; None keeps the stored size (64 for
      'imagenet2012', whose images differ in size).
    crop: cropping and resizing method, a key of `resizing.BY_NAME`.
    skip_corrupt: for 'folder' and 'zip': decode all files once and skip those
      that cannot be decoded.
    channels: 3 (RGB) or 1 (gray), for encoded images (folder, zip, TFDS).
    threads: number of decoding and resizing threads; None: one per core.
    labels: for 'folder' and 'zip': source of the labels, see
      `image_labels.find`.

  Raises:
    UserError: unknown name, a setting that this dataset does not support, files
      that do not match the settings, or 'none' without a shape.
  """
  if name not in NAMES:
    raise errors.unknown_name("data.name", name, NAMES)
  _check_keys(name, path, skip_corrupt, labels)
  decoder = decoding.Decoder(channels, size, crop)
  if name in PUBLISHED:
    return _published(name, decoder, threads)
  if name in FILES:
    if image_shape and not os.path.exists(os.path.expanduser(path)):
      return DataSet(
          tuple(image_shape), num_classes, _missing_path(path), splits=()
      )
    dataset = _from_files(name, path, decoder, skip_corrupt, threads, labels)
    return _check_shape(dataset, path, tuple(image_shape), num_classes)
  if name == "digits":
    dataset = DataSet((8, 8, 1), digits.NUM_CLASSES, digits.digits)
    return _check_size(dataset, name, size)
  if len(image_shape) != 3:
    raise errors.UserError(
        f"data.image_shape: got {image_shape}, expected (height, width, "
        "channels); data.name='none' requires it"
    )
  return DataSet(tuple(image_shape), num_classes, _no_images, splits=())


def _check_keys(
    name: str, path: str | None, skip_corrupt: bool, labels: str
) -> None:
  if name in FILES and not path:
    raise errors.UserError(
        f"data.path: got {path!r}, expected a path with data.name={name!r}; set"
        " it to the file or folder of the images"
    )
  if path and name not in FILES:
    raise errors.UserError(
        f"data.path: got {path!r}, expected None with data.name={name!r}; omit"
        f" it, or set data.name to one of {', '.join(FILES)}"
    )
  if skip_corrupt and name not in ("folder", "zip"):
    raise errors.UserError(
        f"data.skip_corrupt: got True, expected False with data.name={name!r};"
        " omit it, only 'folder' and 'zip' support it"
    )
  if labels != "auto" and name not in ("folder", "zip"):
    raise errors.UserError(
        f"data.labels: got {labels!r}, expected 'auto' with data.name={name!r};"
        " omit it, only 'folder' and 'zip' support it"
    )


def _missing_path(
    path: str
) -> Callable[[str, str | None], image_source.Source]:
  def open_split(split, data_dir=None):
    raise errors.UserError(
        f"data.path: {path!r} does not exist, expected images of split "
        f"{split!r}; correct the path"
    )

  return open_split


def _check_shape(
    dataset: DataSet, path: str, image_shape: tuple, num_classes: int | None
) -> DataSet:
  """Checks the files against data.image_shape and data.num_classes, if set."""
  stored = (tuple(dataset.image_shape), dataset.num_classes)
  if image_shape and stored != (image_shape, num_classes):
    raise errors.UserError(
        f"{path}: got images of shape {stored[0]} and {stored[1] or 'no'} "
        f"classes, expected data.image_shape={image_shape} and "
        f"data.num_classes={num_classes}; correct the path or these keys (() "
        "and None accept any files)"
        + (CLASSES_HINT if num_classes and not stored[1] else "")
    )
  return dataset


def _from_files(
    name: str,
    path: str,
    decoder: decoding.Decoder,
    skip_corrupt: bool,
    threads: int | None,
    labels: str,
) -> DataSet:
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise errors.UserError(
        f"data.path: {path!r} does not exist; correct the path"
    )
  if name == "folder":
    return folder.data_set(path, decoder, skip_corrupt, threads, labels)
  if name == "zip":
    return edm_zip.data_set(path, decoder, skip_corrupt, threads, labels)
  if name == "npz":
    return npz_file.data_set(path, decoder.size, decoder.crop, threads)
  from bcm_jax.data import prepared  # The only import of array_record.

  return _check_size(prepared.data_set(path), name, decoder.size)


def _check_size(dataset: DataSet, name: str, size: int | None) -> DataSet:
  """Checks data.size for a dataset whose images are not resized."""
  height, width, _ = dataset.image_shape
  if size is not None and (height, width) != (size, size):
    raise errors.UserError(
        f"data.size: got {size}, expected the stored {height}x{width} with"
        f" data.name={name!r}; omit it, or prepare the images again with"
        f" --size={size}"
    )
  return dataset


def _published(
    name: str, decoder: decoding.Decoder, threads: int | None
) -> DataSet:
  size, num_classes = PUBLISHED[name]
  decoder = decoding.Decoder(
      decoder.channels, decoder.size or size, decoder.crop, upright=False
  )
  shape = (decoder.size, decoder.size, decoder.channels)

  def open_split(split, data_dir):
    try:
      from bcm_jax.data import published_tfds
    except ImportError as e:
      raise errors.UserError(
          f"data.name: {name!r} requires TensorFlow Datasets, which cannot be "
          f"imported ({e}); install tensorflow and tensorflow-datasets"
      ) from e
    return published_tfds.TFDSSource(
        name, split, num_classes, decoder, data_dir, threads
    )

  return DataSet(shape, num_classes, open_split)


def _no_images(split, data_dir):
  raise errors.UserError(
      f"data.name: got 'none', expected a dataset with images of split "
      f"{split!r}; 'none' is only for sampling from converted weights"
  )
