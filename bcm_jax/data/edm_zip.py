"""Zip datasets of EDM and EDM2 (dataset_tool.py of NVlabs/edm).

An archive has images with names such as 00000/img00000000.png and a
dataset.json with {"labels": [["00000/img00000000.png", 6], ...]}, or null
without labels. PATH is a file (the train split) or a folder with train.zip and
test.zip.
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
  """Thread-safe, picklable reader of a zip file.

  ZipFile locks the file position that its open members share.

  Args:
    path: path of the zip file.

  Raises:
    UserError: the file cannot be opened.
  """

  def __init__(self, path: str):
    self.path = path
    try:
      self._zip = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as e:
      raise errors.UserError(
          f"{path}: cannot be read as a zip file ({type(e).__name__}: {e});"
          " correct data.path, or copy the file again"
      ) from e

  def __reduce__(self):
    return Archive, (self.path,)

  def names(self) -> list[str]:
    """Returns the names of all members, sorted."""
    return sorted(self._zip.namelist())

  def read(self, name: str) -> bytes:
    """Returns the bytes of one member.

    Raises:
      CorruptImage: the checksum or the compressed data is wrong.
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
  """Returns the dataset specification of EDM zip files.

  Reads only the labels and the header of one image.

  Args:
    path: zip file or folder.
    decoder: decodes the images.
    skip_corrupt: decode all images once when a split is opened, and skip those
      that cannot be decoded.
    threads: number of decoding threads; None: one per core.

  Raises:
    UserError: no zip file, no images, or a dataset.json without one class index
      per image.
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
    del data_dir  # Used only by TFDS.
    dataset_spec.check_split(split, files, path)
    archive = Archive(files[split])
    images = _images(archive)
    labels = _labels(archive, images)
    if (labels is None) != (num_classes is None):
      raise errors.UserError(
          f"{path}: got labels in only one split, expected both or neither; add"
          f" or remove a {_LABELS}"
      )
    source = encoded.EncodedSource(
        f"zip/{split}", archive.path, tuple(images),
        np.array(labels or [0] * len(images), np.int32), num_classes,
        archive.read, decoder, shape, example, threads,
    )
    return source.without_corrupt() if skip_corrupt else source

  return dataset_spec.DataSet(shape, num_classes, open_split, tuple(files))


def _images(archive: Archive) -> list[str]:
  images = [n for n in archive.names() if n.lower().endswith(_EXTENSIONS)]
  if not images:
    raise errors.UserError(
        f"{archive.path}: got no images, expected {' '.join(_EXTENSIONS)}"
        " members; create it with EDM's dataset_tool.py"
    )
  return images


def _labels(archive: Archive, images: list[str]) -> list[int] | None:
  """Returns the class index of each image, or None without labels."""
  if _LABELS not in archive.names():
    return None
  try:
    table = json.loads(archive.read(_LABELS))["labels"]
    table = None if table is None else dict(table)
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
        f"{archive.path}: {_LABELS} cannot be read ({type(e).__name__}: {e}),"
        ' expected {"labels": [["00000/img00000000.png", 6], ...]} or null;'
        " correct it"
    ) from e
  if not table:
    return None
  for name in images:
    label = table.get(name)
    if type(label) is not int or label < 0:
      raise errors.UserError(
          f"{archive.path}: {_LABELS}: got label {label!r} of {name}, expected"
          " a class index 0, 1, ...; correct it, or set labels to null"
      )
  return [table[name] for name in images]
