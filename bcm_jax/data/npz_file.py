"""Datasets in .npz files, the sample format of ADM and its successors.

PATH is a file (the train split) or a folder with train.npz and test.npz. All
images are read into memory.
"""

from collections.abc import Iterable, Iterator
import contextlib
import lzma
import math
import os
import re
import tokenize
import zipfile
import zlib

import numpy as np

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import image_labels
from bcm_jax.data import image_source
from bcm_jax.data import resizing
from bcm_jax.utils import thread_pool

IMAGE_KEYS = ("arr_0", "images", "x", "data")
LABEL_KEYS = ("arr_1", "labels", "label", "y")
# Names of arrays that may be labels.
_LIKE_LABELS = re.compile(
    r"(.*[\W_])?(y|labels?|class(es)?|targets?|attributes?|ids)([\W_].*)?",
    re.IGNORECASE,
)


def data_set(
    path: str,
    size: int | None = None,
    crop: str = "adm",
    threads: int | None = None,
) -> dataset_spec.DataSet:
  """Returns the dataset specification of .npz files.

  Reads only the labels and the header of the images.

  Args:
    path: .npz file or folder.
    size: height and width to resize to; None keeps the stored size.
    crop: cropping and resizing method, a key of `resizing.BY_NAME`.
    threads: number of resizing threads; None: one per core.

  Raises:
    UserError: no file, no images under IMAGE_KEYS, or images in NCHW.
  """
  files = dataset_spec.split_files(path, ".npz")
  file = next(iter(files.values()))
  stored = _image_shape(file)
  labels = _labels(file)
  num_classes = None if labels is None else int(labels.max(initial=0)) + 1
  shape = stored if size is None else (size, size, stored[2])

  def open_split(split, data_dir=None):
    del data_dir  # Used only by TFDS.
    dataset_spec.check_split(split, files, path)
    if (image_shape := _image_shape(files[split])) != stored:
      raise errors.UserError(
          f"{files[split]}: got images of shape {image_shape}, expected"
          f" {stored} as in {file}; use one shape in both splits"
      )
    images = _array(files[split], IMAGE_KEYS)
    labels = _labels(files[split])
    if (labels is None) != (num_classes is None):
      raise errors.UserError(
          f"{path}: got labels in only one of {files[split]} and {file},"
          " expected both or neither; store them under"
          f" {' or '.join(LABEL_KEYS)}"
      )
    # Checked before resizing, which would raise a less specific error.
    source = image_source.ArraySource(images, labels, num_classes, files[split])
    if size is None:
      return source
    return image_source.ArraySource(
        _resized(images, shape, crop, threads), labels, num_classes,
        files[split],
    )

  return dataset_spec.DataSet(shape, num_classes, open_split, tuple(files))


def _resized(
    images: np.ndarray,
    shape: tuple[int, int, int],
    crop: str,
    threads: int | None,
) -> np.ndarray:
  resized = np.empty((len(images), *shape), np.uint8)

  def resize(k):
    resized[k] = resizing.BY_NAME[crop](images[k], shape[0])

  thread_pool.for_each(resize, len(images), threads)
  return resized


def _key(
    archive: np.lib.npyio.NpzFile, keys: tuple[str, ...], file: str
) -> str | None:
  """Returns the key in a .npz file; None if it has none of them.

  Raises:
    UserError: the file has several, or no labels but an array that may be some.
  """
  found = [key for key in keys if key in archive.files]
  others = [key for key in archive.files if _LIKE_LABELS.fullmatch(key)]
  if len(found) > 1 or (keys == LABEL_KEYS and not found and others):
    raise errors.UserError(
        f"{file}: got the arrays {', '.join(found or others)}, expected one of"
        f" {', '.join(keys)}; rename or remove the others"
    )
  return found[0] if found else None


def read_arrays(file: str, names: Iterable[str]) -> dict[str, np.ndarray]:
  """Returns the arrays of a .npz file with these names, if they exist.

  Nothing is unpickled, and no more memory is used than the machine has.

  Raises:
    UserError: the file is damaged, or an array is not as its header says.
  """
  with _archive(file) as archive:
    found = {}
    for name in names:
      if name in archive.files:
        _header(archive, name, file)
        found[name] = archive[name]
    return found


@contextlib.contextmanager
def _archive(file: str) -> Iterator[np.lib.npyio.NpzFile]:
  """Opens a .npz file; converts read errors to UserErrors with its name."""
  try:
    if os.path.exists(file) and not zipfile.is_zipfile(file):
      raise ValueError("no zip archive")
    with np.load(file, allow_pickle=False) as archive:
      if len(set(archive.files)) < len(archive.files):
        raise ValueError("two arrays of one name")
      yield archive
  except errors.UserError:
    raise
  # zipfile and NumPy raise all of these for damaged files.
  except (
      OSError, ValueError, EOFError, NotImplementedError, RuntimeError,
      SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error,
      lzma.LZMAError, tokenize.TokenError,
  ) as e:
    reason = " ".join(str(e).split())[:160]
    raise errors.UserError(
        f"{file}: cannot be read as .npz ({type(e).__name__}: {reason}); write"
        " it again with numpy.savez(file, images, labels)"
    ) from e


def _header(
    archive: np.lib.npyio.NpzFile, key: str, file: str
) -> tuple[int, ...]:
  """Returns the shape of an array; reads only its header.

  Raises:
    UserError: an array of objects, one of another length than the header says,
      or one that is larger than the memory.
  """
  member = f"{key}.npy" if f"{key}.npy" in archive.zip.namelist() else key
  with archive.zip.open(member) as f:
    version = np.lib.format.read_magic(f)
    read = (
        np.lib.format.read_array_header_1_0 if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(f)
    length = archive.zip.getinfo(member).file_size - f.tell()
  if dtype.hasobject:
    raise errors.UserError(
        f"{file}: got {key!r} of Python objects, expected numbers; they are"
        " never unpickled: store class indices as integers"
    )
  size = dtype.itemsize * math.prod(shape)
  if size != length or min(shape, default=0) < 0:
    raise errors.UserError(
        f"{file}: got {key!r} of {length:,} bytes, expected {size:,} for"
        f" {dtype} of shape {shape}; write the file again"
    )
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if size > memory:
    raise errors.UserError(
        f"{file}: got {key!r} of {size:,} bytes, expected at most the memory,"
        f" {memory:,}; store the images as files, or in several .npz files"
    )
  return shape


def _array(file: str, keys: tuple[str, ...]) -> np.ndarray | None:
  """Returns the array under the first existing key, or None."""
  with _archive(file) as archive:
    key = _key(archive, keys, file)
  return None if key is None else read_arrays(file, [key])[key]


def _labels(file: str) -> np.ndarray | None:
  labels = _array(file, LABEL_KEYS)
  if labels is not None and labels.dtype.kind not in "iu":
    raise errors.UserError(
        f"{file}: got {labels.dtype} labels of shape {labels.shape}, expected"
        " integers, one per image; store class indices"
    )
  if labels is not None and labels.max(initial=0) > image_labels.MAX_LABEL:
    raise errors.UserError(
        f"{file}: got label {labels.max()}, expected at most"
        f" {image_labels.MAX_LABEL}; store class indices"
    )
  return labels


def _image_shape(file: str) -> tuple[int, int, int]:
  """Returns the shape (H, W, C); reads only the header of the images."""
  with _archive(file) as archive:
    key = _key(archive, IMAGE_KEYS, file)
    if key is None:
      raise errors.UserError(
          f"{file}: got arrays {', '.join(archive.files) or '(none)'}, expected"
          f" images under one of {', '.join(IMAGE_KEYS)}; rename the array"
      )
    shape = _header(archive, key, file)
  if len(shape) != 4:
    raise errors.UserError(
        f"{file}: got {key!r} of shape {shape}, expected [n, H, W, C]; add the"
        " missing axis (gray images have C = 1)"
    )
  if shape[1] in (1, 3) and shape[3] not in (1, 3):
    raise errors.UserError(
        f"{file}: got {key!r} of shape {shape} (NCHW), expected [n, H, W, C];"
        " transpose it with numpy.moveaxis(images, 1, -1)"
    )
  return tuple(shape[1:])

