"""What a data set is before its images are read, and where its splits are."""

from collections.abc import Callable, Iterable
import os
from typing import NamedTuple

from bcm_jax import errors
from bcm_jax.data import image_source

# What the files and folders of a split may be called; the first that is there.
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "validation")}


class DataSet(NamedTuple):
  """A data set that need not be there to be described.

  Attributes:
    image_shape: (H, W, C) of every image.
    num_classes: labels lie in [0, num_classes); None if there are none.
    open: (split, data_dir) -> source of that split.
    splits: those that it has.
    class_names: of the labels 0, 1, ..., where it has names.
  """

  image_shape: tuple[int, int, int]
  num_classes: int | None
  open: Callable[[str, str | None], image_source.Source]
  splits: tuple[str, ...] = ("train", "test")
  class_names: tuple[str, ...] | None = None


def check_split(split: str, splits: Iterable[str], where: str) -> None:
  """Checks that a data set has a split.

  Raises:
    UserError: unknown split, or a split that is not there.
  """
  if split not in SPLIT_NAMES:
    raise errors.unknown_name(f"split of {where}", split, SPLIT_NAMES)
  if split not in splits:
    raise errors.UserError(
        f"{where} has no split {split!r}, only {', '.join(splits)}; add one"
        f" named {' or '.join(SPLIT_NAMES[split])}"
        + (
            ", or take examples out of train: python -m bcm_jax.data.prepare"
            " with --holdout=N"
            if split == "test"
            else ""
        )
    )


def split_files(path: str, suffix: str) -> dict[str, str]:
  """Returns the file of each split.

  Args:
    path: a file, which is the train split, or a folder with train.SUFFIX and
      test.SUFFIX (or val, validation).
    suffix: '.npz' or '.zip'.

  Raises:
    UserError: nothing of that kind is there.
  """
  if os.path.isfile(path):
    return {"train": path}
  found = {}
  for split, names in SPLIT_NAMES.items():
    files = [os.path.join(path, name + suffix) for name in names]
    there = [file for file in files if os.path.isfile(file)]
    if there:
      found[split] = there[0]
  if not found:
    raise errors.UserError(
        f"data.path={path!r} is no file and no folder with train{suffix};"
        " correct the path"
    )
  return found
