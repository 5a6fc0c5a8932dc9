"""Dataset specification and the location of its splits."""

from collections.abc import Callable, Iterable
import os
import re
from typing import NamedTuple

from bcm_jax import errors
from bcm_jax.data import image_source

# Split -> names of its file or folder, in any case; the first that exists is
# used.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
_WORDS = {"training": "train", "testing": "test"} | dict.fromkeys(
    ("valid", "validation"), "val"
)
# 'Train', 'test_set', 'val2017'.
_SPLIT = re.compile(
    rf"({'|'.join(sum(SPLIT_NAMES.values(), ()))})"
    r"[\W_]*(set|split|data|images?)?[\W_\d]*"
)


class DataSet(NamedTuple):
  """Dataset specification; images are read only by `open`.

  Attributes:
    image_shape: (H, W, C) of every image.
    num_classes: labels are in [0, num_classes); None without labels.
    open: (split, data_dir) -> image source of the split.
    splits: names of the available splits.
    class_names: names of the classes 0, 1, ...; None without names.
    label_source: description of where labels come from; None if unknown.
  """

  image_shape: tuple[int, int, int]
  num_classes: int | None
  open: Callable[[str, str | None], image_source.Source]
  splits: tuple[str, ...] = ("train", "test")
  class_names: tuple[str, ...] | None = None
  label_source: str | None = None


def split_word(name: str) -> str | None:
  """Returns 'train', 'test' or 'val' for a usual name of a split, else None."""
  match = _SPLIT.fullmatch(name.lower())
  return match and _WORDS.get(match[1], match[1])


def has_split_word(name: str) -> bool:
  """Returns True for a name with the word of a split: seg_train, testA, te."""
  words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
  return any(split_word(word) or word.lower() in ("tr", "te") for word in words)


def splits_of(names: Iterable[str], where: str) -> dict[str, str]:
  """Returns {split: name} of the names that are splits; test before val.

  Raises:
    UserError: two names of one split.
  """
  found = {}
  for name in names:
    word = split_word(name)
    if word in found:
      raise errors.UserError(
          f"{where}: got {found[word]!r} and {name!r}, expected one {word}"
          " split; rename or move one of the two"
      )
    if word:
      found[word] = name
  splits = {"train": found.get("train")}
  splits["test"] = found.get("test", found.get("val"))
  return {split: name for split, name in splits.items() if name}


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
      test.SUFFIX (or another name in SPLIT_NAMES).
    suffix: '.npz' or '.zip'.

  Raises:
    UserError: no such file exists, or two of one split.
  """
  if os.path.isfile(path):
    return {"train": path}
  stems = {}
  if os.path.isdir(path):
    names = [n for n in sorted(os.listdir(path)) if n.lower().endswith(suffix)]
    stems = {name[: -len(suffix)]: name for name in names}
  files = {
      split: os.path.join(path, stems[stem])
      for split, stem in splits_of(stems, path).items()
  }
  if not files:
    raise errors.UserError(
        f"data.path: got {path!r}, expected a {suffix} file or a folder with"
        f" train{suffix}; correct the path"
    )
  return files
