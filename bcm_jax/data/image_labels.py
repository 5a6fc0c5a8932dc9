"""Labels of image files: class folders, tables, file names.

A table is EDM's dataset.json or the metadata.jsonl / metadata.csv of Hugging
Face's ImageFolder (columns file_name and label). One that exists is used or
named in an error.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
import csv
import dataclasses
import io
import json
import re
from typing import Any

from absl import logging
import numpy as np

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import image_tree

# Values of data.labels besides the name of a table and a regular expression.
CHOICES = ("auto", "none", "folders", "name")
# `Labels.source` of class folders.
FOLDERS = "class folders"
# ADM's convention: class_0001.png.
_NAME = r"(?:^|/)([^/_]+)_[^/]*$"
# The number of classes fits into int32.
MAX_LABEL = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Labels:
  """The label of every file of a split.

  Attributes:
    source: description, for messages.
    num_classes: labels are in [0, num_classes).
    names: names of the classes; None for numbers.
    of: file name, relative to the split's folder -> label. Raises UserError for
      a file without a label.
    files: names that a table lists, relative to the split's folder; they must
      exist.
  """

  source: str
  num_classes: int
  names: tuple[str, ...] | None
  of: Callable[[str], int]
  files: frozenset[str] = frozenset()


def check(option: str) -> None:
  """Checks a value of data.labels.

  Raises:
    UserError: not in CHOICES, no table, and no regular expression with a group.
  """
  if option in CHOICES or option.lower() in image_tree.TABLES:
    return
  if "(" not in option:
    raise errors.unknown_name(
        "data.labels", option,
        (*CHOICES, *image_tree.TABLES, "a regular expression with a (group)"),
    )
  try:
    groups = re.compile(option).groups
  except re.error as e:
    raise errors.UserError(
        f"data.labels: got {option!r}, expected a regular expression ({e});"
        " correct it"
    ) from e
  if groups != 1:
    raise errors.UserError(
        f"data.labels: got {option!r} with {groups} groups, expected one, the"
        " class; use (?:...) for the others"
    )


def find(
    tree: image_tree.Tree,
    places: Sequence[tuple[image_tree.Tree, str]],
    option: str,
    train: Labels | None = None,
) -> Labels | None:
  """Returns the labels of a split; None without labels.

  Args:
    tree: folder of the split.
    places: (folder, prefix) where tables are looked for; file names in a table
      of `folder` start with `prefix`.
    option: data.labels: 'auto' takes a table, else class folders; 'none'; the
      name of a table; 'folders'; 'name' (class_0001.png); or a regular
      expression whose group is the class.
    train: labels of the train split, whose classes this split has; None finds
      the classes.

  Raises:
    UserError: no or several sources of labels, or invalid ones.
  """
  check(option)
  if option == "none":
    return None
  if option == "name" or "(" in option:
    return _from_names(tree, _NAME if option == "name" else option, train)
  found = [
      (place, prefix, name)
      for place, prefix in places
      for name in image_tree.tables(place.entries().files)
      if option in ("auto", name.lower())
  ]
  if option == "folders" or (option == "auto" and not found):
    return _from_folders(tree, places, option, train)
  if len(found) != 1:
    listed = [f"{place.path}/{name}" for place, _, name in found]
    raise errors.UserError(
        f"{tree.path}: got {' and '.join(listed) or 'no ' + option}, expected"
        " one file of labels; set data.labels / --labels to the one to use, to"
        " 'folders' or to 'none'"
    )
  return _from_table(*found[0], train)


# Class folders ---------------------------------------------------------------


def natural(name: str) -> list[Any]:
  """Returns a sorting key that orders numbers in names by value."""
  # Lengths replace int(), which refuses very long numbers.
  parts = re.split(r"([0-9]+)", name)
  return [
      (len(part.lstrip("0")), part.lstrip("0")) if k % 2 else part
      for k, part in enumerate(parts)
  ] + [name]


def class_folders(tree: image_tree.Tree) -> tuple[str, ...]:
  """Returns the names of the class folders; () for images without classes.

  Raises:
    UserError: images next to folders.
  """
  files, folders = tree.entries()
  loose = next(filter(image_tree.is_image, files), None)
  if folders and loose:
    raise errors.UserError(
        f"{tree.path}: got the image {loose!r} and the folder {folders[0]!r},"
        " expected only images or only class folders; move the images into a"
        " class folder, start the folder name with a dot to skip it, or set"
        " data.labels / --labels"
    )
  return tuple(sorted(folders, key=natural))


def _from_folders(tree, places, option, train) -> Labels | None:
  folders = class_folders(tree)
  if option == "auto" and folders and _are_shards(tree, folders):
    logging.warning(
        "%s: no labels: the folders %s, ... are parts of one numbered sequence"
        " and no classes; data.labels / --labels=folders takes them for"
        " classes", tree.path, folders[0],
    )
    return None
  others = [
      f"{place.path}/{name}"
      for place, _ in places
      for name in place.entries().files
      if image_tree.may_be_labels(name)
  ]
  if folders and others:
    logging.warning(
        "%s: not read, as class folders give the labels", ", ".join(others)
    )
  if not folders:
    if option == "folders" or others:
      raise errors.UserError(
          f"{tree.path}: got images without class folders"
          + (f" and {', '.join(others[:3])}, not read" if others else "")
          + ", expected class folders, dataset.json, metadata.jsonl or"
          " metadata.csv (file_name, label); convert the labels, or set"
          " data.labels=none / --labels=none"
      )
    return None
  if all(map(dataset_spec.split_word, folders)) or (
      option == "auto" and all(map(dataset_spec.has_split_word, folders))
  ):
    raise errors.UserError(
        f"{tree.path}: got the splits {', '.join(folders)}, expected class"
        " folders, or splits named train and test; correct data.path, rename"
        " them, or set data.labels / --labels=folders"
    )
  return _of_names(
      FOLDERS, tree, train and train.names or folders,
      lambda file: file.partition("/")[0] if "/" in file else None,
  )


def _are_shards(tree, folders) -> bool:
  """Returns True for parts of one numbered sequence, as EDM and FFHQ write it.

  00001/img00001000.png, 01000/01000.png; GTSRB's 00001/00000_00000.ppm is a
  class.
  """
  if all(re.fullmatch(r"(part|shard|chunk)[-_ ]?[0-9]+", n) for n in folders):
    return True
  if not all(re.fullmatch(r"[0-9]{4,}", name) for name in folders):
    return False
  for name in (folders[0], folders[-1]):
    files = list(filter(image_tree.is_image, tree.sub(name).entries().files))
    match = files and re.fullmatch(r"(img)?([0-9]{5,8})\.\w+", files[0])
    if not match or not (match[1] or int(match[2]) // 1000 * 1000 == int(name)):
      return False
  return True


# File names ------------------------------------------------------------------


def _from_names(tree, pattern, train) -> Labels:
  pattern = re.compile(pattern)
  names = train and train.names

  def name_of(file):
    match = pattern.search(file)
    return match[1] if match else None

  if names is None:
    files = filter(image_tree.is_image, image_tree.walk(tree))
    names = sorted({name_of(f) for f in files} - {None}, key=natural)
  return _of_names(f"file names ({pattern.pattern})", tree, names, name_of)


def _of_names(source, tree, names, name_of) -> Labels:
  """Returns the labels that are positions of class names in `names`."""
  labels = {name: k for k, name in enumerate(names)}

  def of(file):
    name = name_of(file)
    if name not in labels:
      got = "no class" if name is None else f"class {name!r}"
      raise errors.UserError(
          f"{tree.path}: got {got} of {file} from the {source}, expected one of"
          f" train: {', '.join(list(labels)[:5]) or '(none)'}"
          f"{', ...' if len(labels) > 5 else ''}; use the same classes in all"
          " splits, or correct data.labels / --labels"
      )
    return labels[name]

  return Labels(source, len(labels), tuple(names), of)


# Tables ----------------------------------------------------------------------


def _json_rows(text: str) -> list[tuple[str, Any]]:
  content = json.loads(text)
  if "labels" not in content and "format" in content:
    raise ValueError("a prepared dataset, which data.name='prepared' reads")
  rows = content["labels"]
  for row in rows or ():
    if not isinstance(row, list) or [type(row[0]), len(row)] != [str, 2]:
      raise ValueError(f"got the entry {row!r}")
  return rows or []


def _jsonl_rows(text: str) -> list[tuple[str, Any]]:
  return _columns([json.loads(x) for x in text.split("\n") if x.strip()])


def _csv_rows(text: str) -> list[tuple[str, Any]]:
  reader = csv.DictReader(io.StringIO(text, newline=""))
  names = reader.fieldnames or ()
  if len(set(names)) < len(names):
    raise ValueError(f"got the columns {', '.join(names)}, some twice")
  return _columns(list(reader))


def _columns(rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
  if not rows:
    raise ValueError("got no rows")
  if "label" not in rows[0]:
    raise ValueError(f"got columns {', '.join(map(str, rows[0]))}")
  for row in rows:
    if not isinstance(row.get("file_name"), str):
      raise ValueError(f"got the file_name {row.get('file_name')!r}")
  return [(row["file_name"], row.get("label")) for row in rows]


_COLUMNS = "columns file_name and label, with a row for each image"
# Name of a table -> (parser, description of the content).
_FORMATS: dict[str, tuple[Callable[[str], list[tuple[str, Any]]], str]] = {
    "dataset.json": (
        _json_rows, '{"labels": [["00000/img00000000.png", 6], ...]} or null',
    ),
    "metadata.jsonl": (_jsonl_rows, _COLUMNS),
    "metadata.csv": (_csv_rows, _COLUMNS),
}


def _from_table(place, prefix, name, train) -> Labels | None:
  path = f"{place.path}/{name}"
  parse, expected = _FORMATS[name.lower()]
  try:
    rows = parse(place.read(name).decode("utf-8-sig"))
  except OSError as e:
    raise errors.UserError(
        f"{path}: cannot be read ({e.strerror}); check its permissions"
    ) from e
  except (
      ValueError, LookupError, TypeError, AttributeError, RecursionError,
      csv.Error,
  ) as e:
    reason = " ".join(str(e).split())[:160]
    raise errors.UserError(
        f"{path}: cannot be read ({type(e).__name__}: {reason}), expected"
        f" {expected}; correct it, or set data.labels / --labels to 'folders'"
        " or 'none'"
    ) from e
  if not rows:
    logging.warning("%s: no labels", path)
    return None
  files = [file.replace("\\", "/").removeprefix("./") for file, _ in rows]
  if len(set(files)) < len(files):
    repeated = collections.Counter(files).most_common(1)[0][0]
    raise errors.UserError(
        f"{path}: got two labels of {repeated}, expected one; correct it"
    )
  values = [label for _, label in rows]
  named = name.lower() != "dataset.json" and _are_names(values)
  if not named:
    values = [
        _class_index(path, file, label)
        for file, label in zip(files, values, strict=True)
    ]
  table = dict(zip(files, values, strict=True))

  def value_of(file):
    if prefix + file not in table:
      raise errors.UserError(
          f"{path}: got label None of {prefix}{file}, expected one label for"
          " each image; add it, or set labels to null / --labels=none"
      )
    return table[prefix + file]

  below = frozenset(
      f.removeprefix(prefix) for f in files if f.startswith(prefix)
  )
  if named:
    names = train and train.names or sorted(set(values), key=natural)
    labels = _of_names(name, place, names, value_of)
  else:
    labels = Labels(name, max(values) + 1, None, value_of)
  return dataclasses.replace(labels, files=below)


def _are_names(values: Iterable[Any]) -> bool:
  """Returns True for texts that are not numbers."""
  return all(
      isinstance(v, str) and v and not re.fullmatch(r"[-+.\d]+(e[-+\d]+)?", v)
      for v in values
  )


def _class_index(path: str, file: str, label: Any) -> int:
  if isinstance(label, str) and re.fullmatch(r"[0-9]{1,10}", label):
    label = int(label) if path.lower().endswith(".csv") else label
  if type(label) is not int or not 0 <= label <= MAX_LABEL:
    raise errors.UserError(
        f"{path}: got label {label!r} of {file}, expected a class index 0, 1,"
        " ...; correct it, or set labels to null / --labels=none"
    )
  return label


# Gaps ------------------------------------------------------------------------


def missing_classes(present: np.ndarray, num_classes: int) -> str:
  """Returns a description of the classes without images; '' for none.

  Args:
    present: sorted labels that occur, integers [m].
    num_classes: number of classes.
  """
  count = num_classes - len(present)
  if not count:
    return ""
  gap = np.flatnonzero(present != np.arange(len(present)))
  first = gap[0] if gap.size else len(present)
  more = f" and {count - 1} more" if count > 1 else ""
  return f"no images of class {first}{more} of {num_classes}"
