"""Dataset specification and the location of its splits."""

from collections.abc import Callable, Iterable
import os
from typing import NamedTuple

from bcm_jax import errors
from bcm_jax.data import image_source

# Split -> names of its file or folder; the first that exists is used.
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation")}


class DataSet(NamedTuple):
  """Dataset specification; images are read only by `open`.

  Attributes:
    image_shape: (H, W, C) of every image.
    num_classes: labels are in [0, num_classes); None without labels.
    open: (split, data_dir) -> image source of the split.
    splits: names of the available splits.
    class_names: names of the classes 0, 1, ...; None without names.
  """

  image_shape: tuple[int, int, int]
  num_classes: int | None
  open: Callable[[str, str | None], image_source.Source]
  splits: tuple[str, ...] = ("train", "test")
  class_names: tuple[str, ...] | None = None


def check_split(split: str, splits: Iterable[str], where: str) -> None:
  """Checks that a dataset has a split.

  Args:
    split: name of the split, a key of SPLIT_NAMES.
    splits: the available splits.
    where: dataset or path, for the error message.

  Raises:
    UserError: the split is unknown or not available.
  """
  if split not in SPLIT_NAMES:
    raise errors.unknown_name(f"split of {where}", split, SPLIT_NAMES)
  if split not in splits:
    raise errors.UserError(
        f"{where}: got split {split!r}, expected {' or '.join(splits)}; add a"
        f" split named {' or '.join(SPLIT_NAMES[split])}"
        + (
            ", or split train with python -m bcm_jax.data.prepare --holdout=N"
            if split == "test"
            else ""
        )
    )


def split_files(path: str, suffix: str) -> dict[str, str]:
  """Returns the file of each split.

  Args:
    path: a file (the train split), or a folder with train.SUFFIX and
      test.SUFFIX (or val, validation).
    suffix: '.npz' or '.zip'.

  Raises:
    UserError: no such file exists.
  """
  if os.path.isfile(path):
    return {"train": path}
  files = {}
  for split, names in SPLIT_NAMES.items():
    candidates = [os.path.join(path, name + suffix) for name in names]
    existing = [file for file in candidates if os.path.isfile(file)]
    if existing:
      files[split] = existing[0]
  if not files:
    raise errors.UserError(
        f"data.path: got {path!r}, expected a {suffix} file or a folder with"
        f" train{suffix}; correct the path"
    )
  return files
