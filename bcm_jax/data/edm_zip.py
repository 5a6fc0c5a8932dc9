"""The zip files of EDM and EDM2 (dataset_tool.py of NVlabs/edm).

Images with names such as 00000/img00000000.png, and a dataset.json with
{"labels": [["00000/img00000000.png", 6], ...]}, or null where there are none.
PATH is a file, the train split, or a folder with train.zip and test.zip.
"""

import json
import zipfile
import zlib

import numpy as np

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import decoding
from bcm_jax.data import encoded
from bcm_jax.data import folder

_LABELS = "dataset.json"
_EXTENSIONS = (*folder.EXTENSIONS, ".npy")


class Archive:
  """Reads members of a zip file, from several threads if need be.

  ZipFile itself locks what its open members share, the place in the file.

  Args:
    path: the file.

  Raises:
    UserError: it cannot be opened.
  """

  def __init__(self, path: str):
    self.path = path
    try:
      self._zip = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as e:
      raise errors.UserError(
          f"{path} cannot be read as a zip file ({type(e).__name__}: {e});"
          " correct data.path, or copy the file anew"
      ) from e

  def __reduce__(self):
    return Archive, (self.path,)

  def names(self) -> list[str]:
    """Returns all members in the order of their names."""
    return sorted(self._zip.namelist())

  def read(self, name: str) -> bytes:
    """Returns the bytes of one member.

    Raises:
      CorruptImage: its checksum or its compression is wrong.
    """
    try:
      return self._zip.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
      raise decoding.corrupt(f"{self.path}/{name}", e) from e


def data_set(
    path: str,
    decoder: decoding.Decoder,
    skip_corrupt: bool = False,
    threads: int | None = None,
) -> dataset_spec.DataSet:
  """Describes zip files from their labels and the header of one image.

  Args:
    path: the file, or a folder of one file per split.
    decoder, skip_corrupt, threads: as in folder.data_set.

  Raises:
    UserError: no zip file, no images in it, or a dataset.json without one class
      number per image.
  """
  files = dataset_spec.split_files(path, ".zip")
  archive = Archive(next(iter(files.values())))
  images = _images(archive)
  labels = _labels(archive, images)
  num_classes = None if labels is None else max(labels) + 1
  shape, example = encoded.first_shape(
      archive.path, images, archive.read, decoder, skip_corrupt
  )

  def open_split(split, data_dir=None):
    del data_dir  # Of TFDS.
    dataset_spec.check_split(split, files, path)
    archive = Archive(files[split])
    images = _images(archive)
    labels = _labels(archive, images)
    if (labels is None) != (num_classes is None):
      raise errors.UserError(
          f"one split of {path} has labels and the other has not; give both a"
          f" {_LABELS}, or neither"
      )
    source = encoded.EncodedSource(
        f"zip/{split}", archive.path, tuple(images),
        np.array(labels or [0] * len(images), np.int32), num_classes,
        archive.read, decoder, shape, example, threads,
    )
    return source.without_corrupt() if skip_corrupt else source

  return dataset_spec.DataSet(shape, num_classes, open_split, tuple(files))


def _images(archive: Archive) -> list[str]:
  found = [n for n in archive.names() if n.lower().endswith(_EXTENSIONS)]
  if not found:
    raise errors.UserError(
        f"{archive.path} holds no image, expected {' '.join(_EXTENSIONS)}"
        " members; make it with EDM's dataset_tool.py"
    )
  return found


def _labels(archive: Archive, images: list[str]) -> list[int] | None:
  """Returns the class of each image, or None where there are none."""
  if _LABELS not in archive.names():
    return None
  try:
    table = json.loads(archive.read(_LABELS))["labels"]
    table = None if table is None else dict(table)
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
        f"{_LABELS} of {archive.path} cannot be read ({type(e).__name__}: {e}),"
        ' expected {"labels": [["00000/img00000000.png", 6], ...]} or null;'
        " correct it"
    ) from e
  if not table:
    return None
  for name in images:
    label = table.get(name)
    if type(label) is not int or label < 0:
      raise errors.UserError(
          f"{_LABELS} of {archive.path} gives {name} the label {label!r},"
          " expected a class number 0, 1, ...; correct it, or set labels to"
          " null"
      )
  return [table[name] for name in images]
