"""Image folders, with one sub-folder per class or without classes.

    PATH/train/cat/1.png  PATH/train/dog/1.png  PATH/test/cat/2.png

PATH without train/ is the train split. Label i is the i-th class folder of the
train split, sorted by name; images can be nested at any depth below their class
folder. Names that start with a dot are ignored. Images are sorted by name
within each folder, so that the order does not depend on the file system.
"""

from collections.abc import Iterator
import functools
import os

import numpy as np

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import decoding
from bcm_jax.data import encoded

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def data_set(
    path: str,
    decoder: decoding.Decoder,
    skip_corrupt: bool = False,
    threads: int | None = None,
) -> dataset_spec.DataSet:
  """Returns the dataset specification of an image folder.

  Reads only the class folders and the header of one image.

  Args:
    path: path of the folder.
    decoder: decodes the images.
    skip_corrupt: decode all files once when a split is opened, and skip those
      that cannot be decoded.
    threads: number of decoding threads; None: one per core.

  Raises:
    UserError: no folder, no images, or sub-folders that are a mixture of splits
      and classes.
  """
  roots = _split_roots(path)
  first = next(iter(roots.values()))
  classes = _classes(first)
  shape, example = encoded.first_shape(
      first, _some_images(first), functools.partial(_read, first), decoder,
      skip_corrupt,
  )

  def open_split(split, data_dir=None):
    del data_dir  # Used only by TFDS.
    dataset_spec.check_split(split, roots, path)
    root = roots[split]
    files, labels = _listing(root, classes)
    source = encoded.EncodedSource(
        f"folder/{split}", root, tuple(files), np.array(labels, np.int32),
        len(classes) or None, functools.partial(_read, root), decoder, shape,
        example, threads,
    )
    return source.without_corrupt() if skip_corrupt else source

  return dataset_spec.DataSet(
      shape, len(classes) or None, open_split, tuple(roots), classes or None
  )


def _read(root: str, file: str) -> bytes:
  with open(os.path.join(root, file), "rb") as f:
    return f.read()


def _entries(folder: str) -> list[os.DirEntry]:
  """Returns the entries of a folder, sorted by name, without hidden ones."""
  try:
    with os.scandir(folder) as entries:
      visible = [e for e in entries if not e.name.startswith(".")]
  except OSError as e:
    raise errors.UserError(
        f"{folder}: cannot be read ({e.strerror}), expected a folder of images"
        " or class folders; correct data.path"
    ) from e
  return sorted(visible, key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry) -> bool:
  return entry.name.lower().endswith(EXTENSIONS) and entry.is_file()


def images(folder: str) -> Iterator[str]:
  """Yields the paths of all images below a folder, relative to it."""
  for entry in _entries(folder):
    if entry.is_dir():
      yield from (f"{entry.name}/{inner}" for inner in images(entry.path))
    elif _is_image(entry):
      yield entry.name


def _some_images(root: str) -> Iterator[str]:
  """Yields `images(root)`; raises UserError if there are none."""
  files = images(root)
  first = next(files, None)
  if first is None:
    raise errors.UserError(
        f"{root}: got no images, expected {' '.join(EXTENSIONS)} files or class"
        " folders with such files; correct data.path"
    )
  yield first
  yield from files


def _split_roots(path: str) -> dict[str, str]:
  """Returns the folder of each split."""
  folders = tuple(e.name for e in _entries(path) if e.is_dir())
  roots = {}
  for split, names in dataset_spec.SPLIT_NAMES.items():
    existing = [name for name in names if name in folders]
    if existing:
      roots[split] = os.path.join(path, existing[0])
  if not roots:
    return {"train": path}
  split_names = sum(dataset_spec.SPLIT_NAMES.values(), ())
  others = [name for name in folders if name not in split_names]
  if others:
    raise errors.UserError(
        f"{path}: got split {os.path.basename(next(iter(roots.values())))!r}"
        f" and {others[0]!r}, expected only splits ({', '.join(split_names)})"
        " or only class folders; rename or move one of the two"
    )
  return roots


def _classes(root: str) -> tuple[str, ...]:
  """Returns the names of the class folders; () for images without classes."""
  entries = _entries(root)
  folders = tuple(e.name for e in entries if e.is_dir())
  loose = next((e.name for e in entries if _is_image(e)), None)
  if folders and loose:
    raise errors.UserError(
        f"{root}: got the image {loose!r} and the folder {folders[0]!r},"
        " expected only images or only class folders; move the images into a"
        " class folder, or start the folder name with a dot to skip it"
    )
  return folders


def _listing(
    root: str, classes: tuple[str, ...]
) -> tuple[list[str], list[int]]:
  """Returns the files of a split and their labels.

  Args:
    root: folder of the split.
    classes: class names of the train split; the label is an index into these.
  """
  folders = _classes(root)
  if bool(folders) != bool(classes) or set(folders) - set(classes):
    wrong = next((name for name in folders if name not in classes), None)
    raise errors.UserError(
        f"{root}: got "
        + (f"class {wrong!r}" if wrong else "no classes")
        + ", expected the classes of train: "
        + (", ".join(classes[:5]) or "no classes")
        + (", ..." if len(classes) > 5 else "")
        + "; use the same class folders in both splits"
    )
  if not folders:
    files = list(_some_images(root))
    return files, [0] * len(files)
  files, labels = [], []
  for name in folders:
    class_files = [f"{name}/{f}" for f in images(os.path.join(root, name))]
    if not class_files:
      raise errors.UserError(
          f"{os.path.join(root, name)}: got no images, expected"
          f" {' '.join(EXTENSIONS)} files in a class folder; fill or delete it,"
          " or start its name with a dot to skip it"
      )
    files += class_files
    labels += [classes.index(name)] * len(class_files)
  return files, labels
