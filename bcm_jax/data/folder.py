"""A folder of images, with a sub-folder a class or without classes.

    PATH/train/cat/1.png  PATH/train/dog/1.png  PATH/test/cat/2.png

PATH without train/ is itself the train split. Labels number the class folders
of train in the order of their names; images lie at any depth below their
class. Names that start with a dot are left out. The order of the images is
that of their names, folder by folder, whatever the file system says.
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
  """Describes a folder from its class folders and the header of one image.

  Args:
    path: the folder.
    decoder: gives channels, and the size if images are resized.
    skip_corrupt: opening a split decodes every file once and omits those that
      cannot be decoded.
    threads: of decoding; None is one per core.

  Raises:
    UserError: no folder, no images, or sub-folders that may be splits as well
      as classes.
  """
  roots = _split_roots(path)
  first = next(iter(roots.values()))
  classes = _classes(first)
  shape, example = encoded.first_shape(
      first, _found(first), functools.partial(_read, first), decoder,
      skip_corrupt,
  )

  def open_split(split, data_dir=None):
    del data_dir  # Of TFDS.
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
  """What is in a folder, by name, hidden things left out."""
  try:
    with os.scandir(folder) as entries:
      visible = [e for e in entries if not e.name.startswith(".")]
  except OSError as e:
    raise errors.UserError(
        f"folder {folder!r} cannot be read ({e.strerror}), expected images or"
        " class folders; correct data.path"
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


def _found(root: str) -> Iterator[str]:
  """As `images`, but having none is an error."""
  found = images(root)
  first = next(found, None)
  if first is None:
    raise errors.UserError(
        f"{root} holds no image, expected {' '.join(EXTENSIONS)} files in it or"
        " in class folders; correct data.path"
    )
  yield first
  yield from found


def _folders(folder: str) -> tuple[str, ...]:
  return tuple(e.name for e in _entries(folder) if e.is_dir())


def _split_roots(path: str) -> dict[str, str]:
  """Returns the folder of each split."""
  folders = _folders(path)
  roots = {}
  for split, names in dataset_spec.SPLIT_NAMES.items():
    there = [name for name in names if name in folders]
    if there:
      roots[split] = os.path.join(path, there[0])
  if not roots:
    return {"train": path}
  known = sum(dataset_spec.SPLIT_NAMES.values(), ())
  others = [name for name in folders if name not in known]
  if others:
    raise errors.UserError(
        f"{path} holds {os.path.basename(next(iter(roots.values())))!r}, the"
        f" name of a split, beside {others[0]!r}, expected either splits"
        f" ({', '.join(known)}) or classes; rename or move one of the two"
    )
  return roots


def _classes(root: str) -> tuple[str, ...]:
  """Returns the names of the class folders, or () for images without them."""
  entries = _entries(root)
  folders = tuple(e.name for e in entries if e.is_dir())
  loose = next((e.name for e in entries if _is_image(e)), None)
  if folders and loose:
    raise errors.UserError(
        f"{root} holds the image {loose!r} beside the folder {folders[0]!r},"
        " expected images or class folders, not both; move the images into a"
        " class folder, or start the folder's name with a dot to leave it out"
    )
  return folders


def _listing(
    root: str, classes: tuple[str, ...]
) -> tuple[list[str], list[int]]:
  """Returns the files of a split and their labels.

  Args:
    root: folder of the split.
    classes: of the train split, which number the labels.
  """
  mine = _classes(root)
  if bool(mine) != bool(classes) or set(mine) - set(classes):
    wrong = next((name for name in mine if name not in classes), None)
    raise errors.UserError(
        f"{root} has "
        + (f"a class {wrong!r}" if wrong else "no classes")
        + f", the train split {', '.join(classes[:5]) or 'no classes'}"
        + (", ..." if len(classes) > 5 else "")
        + "; give both the same class folders"
    )
  if not mine:
    files = list(_found(root))
    return files, [0] * len(files)
  files, labels = [], []
  for name in mine:
    inside = [f"{name}/{f}" for f in images(os.path.join(root, name))]
    if not inside:
      raise errors.UserError(
          f"class folder {os.path.join(root, name)} holds no image, expected"
          f" {' '.join(EXTENSIONS)} files; fill or delete it, or start its name"
          " with a dot to leave it out"
      )
    files += inside
    labels += [classes.index(name)] * len(inside)
  return files, labels
