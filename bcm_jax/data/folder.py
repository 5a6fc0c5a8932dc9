"""Image folders: with class folders, a table of labels, or without labels.

    PATH/train/cat/1.png  PATH/train/dog/1.png  PATH/test/cat/2.png

PATH without train/ is the train split. Label i is the i-th class folder of the
train split, in natural order (2 before 10); images can be nested at any depth
below their class folder. A dataset.json (EDM) or metadata.jsonl / metadata.csv
gives the labels instead (`labels`). Names that start with a dot are ignored.
Images are sorted by name within each folder, so that the order does not depend
on the file system.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import os

from absl import logging
import numpy as np

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import decoding
from bcm_jax.data import encoded
from bcm_jax.data import image_labels
from bcm_jax.data import image_tree

EXTENSIONS = image_tree.EXTENSIONS


def data_set(
    path: str,
    decoder: decoding.Decoder,
    skip_corrupt: bool = False,
    threads: int | None = None,
    labels: str = "auto",
) -> dataset_spec.DataSet:
  """Returns the dataset specification of an image folder.

  Reads only the class folders, or the table of labels, and the header of one
  image.

  Args:
    path: path of the folder.
    decoder: decodes the images.
    skip_corrupt: decode all files once when a split is opened, and skip those
      that cannot be decoded.
    threads: number of decoding threads; None: one per core.
    labels: source of the labels, see `image_labels.find`.

  Raises:
    UserError: no folder, no images, sub-folders that are a mixture of splits
      and classes, or no unique source of labels.
  """
  return from_roots(
      "folder", path, splits(image_tree.Disk(path)), decoder, skip_corrupt,
      threads, labels,
  )


# Split -> (its folder, places of tables of labels, see `image_labels.find`).
Roots = Mapping[
    str, tuple[image_tree.Tree, Sequence[tuple[image_tree.Tree, str]]]
]


def from_roots(
    kind: str,
    path: str,
    roots: Roots,
    decoder: decoding.Decoder,
    skip_corrupt: bool,
    threads: int | None,
    option: str,
) -> dataset_spec.DataSet:
  """Returns the specification of a dataset of image files; see `data_set`."""
  first, places = next(iter(roots.values()))
  train = image_labels.find(first, places, option)
  num_classes = train and train.num_classes
  shape, example = encoded.first_shape(
      first.path, _images(first, option), first.read, decoder, skip_corrupt
  )

  def open_split(split, data_dir=None):
    del data_dir  # Used only by TFDS.
    dataset_spec.check_split(split, roots, path)
    tree, places = roots[split]
    labels = train
    if tree is not first:
      labels = image_labels.find(tree, places, option, train)
      _check_same_source(path, split, labels, train)
    files = _listing(tree, labels, option)
    values = [labels.of(f) for f in files] if labels else [0] * len(files)
    values = np.array(values, np.int32)
    if num_classes and tree is first:
      missing = image_labels.missing_classes(np.unique(values), num_classes)
      if missing:
        logging.warning("%s: %s", tree.path, missing)
    source = encoded.EncodedSource(
        f"{kind}/{split}", tree.path, tuple(files), values, num_classes,
        tree.read, decoder, shape, example, threads,
    )
    return source.without_corrupt() if skip_corrupt else source

  return dataset_spec.DataSet(
      shape, num_classes, open_split, tuple(roots), train and train.names,
      train and train.source,
  )


def splits(tree: image_tree.Tree, classes: Iterable[str] = ()) -> Roots:
  """Returns the folder of each split, and where its table of labels may be.

  Args:
    tree: folder of the dataset.
    classes: known class names, which are no folders around the data.

  Raises:
    UserError: a mixture of splits and classes.
  """
  tree = image_tree.top(tree, classes)
  files, folders = tree.entries()
  found = dataset_spec.splits_of(folders, tree.path)
  if not found:
    return {"train": (tree, [(tree, "")])}
  others = [f for f in folders if not dataset_spec.split_word(f)]
  if others:
    raise errors.UserError(
        f"{tree.path}: got split {next(iter(found.values()))!r} and"
        f" {others[0]!r}, expected only splits (train, test, val) or only class"
        " folders; rename or move one of the two"
    )
  unused = [f for f in folders if f not in found.values()]
  unused += filter(image_tree.is_image, files)
  if unused:
    logging.warning(
        "%s: not read: %s%s; the splits are %s", tree.path,
        ", ".join(unused[:3]), ", ..." if len(unused) > 3 else "",
        ", ".join(found.values()),
    )
  roots = {}
  for split, name in found.items():
    below = tree.sub(name)
    roots[split] = (below, [(below, ""), (tree, f"{name}/")])
  return roots


def _check_same_source(path, split, labels, train) -> None:
  sources = [x and x.source for x in (labels, train)]
  if sources[0] != sources[1]:
    raise errors.UserError(
        f"{path}: got labels of {split} from {sources[0] or 'nowhere'}, of"
        f" train from {sources[1] or 'nowhere'}, expected one source; give both"
        " splits labels of one kind, or set data.labels=none / --labels=none"
    )


def _images(tree: image_tree.Tree, option: str) -> Iterator[str]:
  """Yields the image files of a split.

  Raises:
    UserError: no images, or, with data.labels='auto', a table of labels in a
      sub-folder.
  """
  others = collections.Counter()
  images = (
      file for file in image_tree.walk(tree) if _is_image(file, others)
  )
  first = next(images, None)
  if first is None:
    raise errors.UserError(
        f"{tree.path}: got no images{_counts(' but', others)}, expected"
        f" {' '.join(EXTENSIONS)} files or class folders with such files;"
        " correct data.path"
    )
  yield first
  yield from images
  deep = next((f for f in others if "/" in f), None)
  if deep and option == "auto":
    raise errors.UserError(
        f"{tree.path}/{deep}: got labels in a sub-folder, expected them in"
        f" {tree.path}; move them, or set data.labels / --labels"
    )
  if others:
    logging.warning("%s: not read:%s", tree.path, _counts("", others))


def _is_image(file: str, others: collections.Counter[str]) -> bool:
  """Returns whether a file is an image; counts the others by suffix.

  Tables of labels in sub-folders are counted by their path.
  """
  if image_tree.is_image(file):
    return True
  name = os.path.basename(file)
  if not image_tree.tables([name]):
    others[os.path.splitext(name)[1] or name] += 1
  elif name != file:
    others[file] += 1
  return False


def _counts(word: str, others: collections.Counter[str]) -> str:
  most = others.most_common(10)
  counts = f"{word} " + ", ".join(f"{n} {suffix}" for suffix, n in most)
  return counts if others else ""


def _listing(
    tree: image_tree.Tree, labels: image_labels.Labels | None, option: str
) -> list[str]:
  """Returns the image files of a split.

  Raises:
    UserError: a class without images, or a table names missing files.
  """
  files = list(_images(tree, option))
  missing = sorted(labels.files.difference(files)) if labels else ()
  if missing:
    raise errors.UserError(
        f"{tree.path}: {labels.source} names {missing[0]}, which is no image"
        f" file there ({len(missing)} such names), expected existing images;"
        " copy the files again, or remove the names"
    )
  if labels and labels.source == image_labels.FOLDERS:
    folders = image_labels.class_folders(tree)
    inner = {f.split("/")[1] for f in files if f.count("/") > 1}
    if inner and all(map(dataset_spec.split_word, inner)):
      raise errors.UserError(
          f"{tree.path}: got splits ({', '.join(sorted(inner)[:3])}) below the"
          f" class {folders[0]!r}, expected classes below splits; move the"
          f" images to train/{folders[0]}"
      )
    full = {f.partition("/")[0] for f in files}
    empty = next((name for name in folders if name not in full), None)
    if empty is not None:
      raise errors.UserError(
          f"{tree.path}/{empty}: got no images, expected"
          f" {' '.join(EXTENSIONS)} files in a class folder; fill or delete it,"
          " or start its name with a dot to skip it"
      )
    rank = {name: k for k, name in enumerate(folders)}
    files.sort(key=lambda f: rank[f.partition("/")[0]])
  return files
