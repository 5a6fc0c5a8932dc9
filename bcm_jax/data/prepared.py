"""Prepared datasets: raw pixels with random access.

`bcm_jax.data.prepare` writes a folder with array_record shards and a
dataset.json. A record is the label as a little-endian int32, followed by the
pixels as uint8 [H, W, C], so that reading does not decode images.
"""

import hashlib
import json
import math
import os
import threading
from typing import Any

from array_record.python import array_record_module
import numpy as np

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.utils import files

MANIFEST = "dataset.json"
FORMAT = "bcm_jax images"
VERSION = 1
# One record per group and no compression, for random access.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# Read-ahead would read neighbors that a shuffled batch does not contain, and
# passing a record of a few KB to another thread is slower than reading it.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_LABEL = np.dtype("<i4")


def record_bytes(image_shape: tuple[int, int, int]) -> int:
  """Returns the length of a record in bytes."""
  return _LABEL.itemsize + math.prod(image_shape)


def is_prepared(path: str) -> bool:
  """Returns True if a folder has a dataset.json of this format."""
  try:
    with open(os.path.join(path, MANIFEST), encoding="utf-8") as f:
      return json.load(f)["format"] == FORMAT
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return False


def read_manifest(path: str) -> dict[str, Any]:
  """Returns the dataset.json of a prepared folder.

  Raises:
    UserError: the file is missing or has another format or version.
  """
  file = os.path.join(path, MANIFEST)
  try:
    with open(file, encoding="utf-8") as f:
      manifest = json.load(f)
  except FileNotFoundError as e:
    raise errors.UserError(
        f"{path}: {MANIFEST} does not exist, expected a folder written by"
        " python -m bcm_jax.data.prepare; correct data.path, or set data.name"
        " to 'folder' for images"
    ) from e
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(
        f"{file}: cannot be read ({type(e).__name__}: {e}); prepare the dataset"
        " again"
    ) from e
  header = (None, None)
  if isinstance(manifest, dict):
    header = (manifest.get("format"), manifest.get("version"))
  if header != (FORMAT, VERSION):
    raise errors.UserError(
        f"{file}: got format {header[0]!r}, version {header[1]}, expected"
        f" {FORMAT!r}, version {VERSION}; prepare the dataset again"
    )
  if not _is_valid(manifest):
    raise errors.UserError(
        f"{file}: damaged, expected image_shape, num_classes, class_names and"
        " splits with shards of this folder; prepare the dataset again"
    )
  return manifest


def _is_valid(manifest: dict[str, Any]) -> bool:
  """Returns whether the types and counts of a manifest are as written."""
  try:
    shape, classes = manifest["image_shape"], manifest["num_classes"]
    names, splits = manifest["class_names"], manifest["splits"]
    sizes = list(shape) + ([] if classes is None else [classes])
    valid = len(shape) == 3 and len(splits) > 0
    valid &= names is None or (
        len(names) == classes and {type(n) for n in names} == {str}
    )
    for split in splits.values():
      for shard in split["shards"]:
        sizes += [shard["count"], shard["bytes"]]
        # A path could lead out of the folder.
        valid &= os.path.basename(shard["file"]) == shard["file"]
      valid &= len(split["shards"]) > 0
    return valid and all(type(n) is int and n > 0 for n in sizes)
  except (LookupError, TypeError, AttributeError):
    return False


def write_manifest(path: str, **content: Any) -> None:
  """Writes dataset.json; call it after all shards are written.

  Raises:
    MachineError: it cannot be written.
  """
  file = os.path.join(path, MANIFEST)
  try:
    files.write_json(file, {"format": FORMAT, "version": VERSION} | content)
  except OSError as e:
    raise _unwritable(file, e) from e


def data_set(path: str) -> dataset_spec.DataSet:
  """Returns the dataset specification in dataset.json.

  Raises:
    UserError: see `read_manifest`.
  """
  manifest = read_manifest(path)
  splits = tuple(manifest["splits"])
  names = manifest["class_names"]

  def open_split(split, data_dir=None):
    del data_dir  # Used only by TFDS.
    dataset_spec.check_split(split, splits, path)
    return PreparedSource(path, split)

  return dataset_spec.DataSet(
      tuple(manifest["image_shape"]), manifest["num_classes"], open_split,
      splits, None if names is None else tuple(names),
  )


def _unwritable(file: str, error: Exception) -> errors.MachineError:
  reason = " ".join(str(error).split())[:160]
  return errors.MachineError(
      f"{file}: cannot be written ({reason}); free space, or choose another OUT"
  )


class ShardWriter:
  """Writer of one shard.

  Args:
    path: path of the file.

  Raises:
    MachineError: by any method: the file cannot be written.
  """

  def __init__(self, path: str):
    self._path, self._count = path, 0
    try:
      self._writer = array_record_module.ArrayRecordWriter(
          path, _WRITER_OPTIONS
      )
    except RuntimeError as e:
      raise _unwritable(path, e) from e

  def write(self, image: np.ndarray, label: np.ndarray) -> None:
    """Appends examples with image uint8 [n, H, W, C] and label int32 [n]."""
    rows = np.concatenate(
        [
            label.astype(_LABEL)[:, None].view(np.uint8),
            image.reshape(len(image), math.prod(image.shape[1:])),
        ],
        axis=1,
    )
    try:
      for row in rows:
        self._writer.write(row.tobytes())
    except RuntimeError as e:
      raise _unwritable(self._path, e) from e
    self._count += len(rows)

  def close(self) -> dict[str, Any]:
    """Closes the file and returns its entry in dataset.json."""
    try:
      self._writer.close()
    except RuntimeError as e:
      raise _unwritable(self._path, e) from e
    with open(self._path, "rb") as f:
      digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {
        "file": os.path.basename(self._path),
        "count": self._count,
        "bytes": os.path.getsize(self._path),
        "sha256": digest,
    }


class PreparedSource:
  """An `image_source.Source` of one split of a prepared dataset.

  Args:
    path: prepared folder.
    split: a split in its dataset.json.

  Raises:
    UserError: a shard is missing, or its length differs from dataset.json.
  """

  def __init__(self, path: str, split: str):
    manifest = read_manifest(path)
    shards = manifest["splits"][split]["shards"]
    self.name = f"{os.path.basename(os.path.abspath(path))}/{split}"
    self.image_shape = tuple(manifest["image_shape"])
    self.num_classes = manifest["num_classes"]
    self._path, self._split = path, split
    self._files = [os.path.join(path, shard["file"]) for shard in shards]
    _check_sizes(path, self._files, [shard["bytes"] for shard in shards])
    self._readers = [_open(f) for f in self._files]
    counts = [shard["count"] for shard in shards]
    for file, reader, count in zip(
        self._files, self._readers, counts, strict=True
    ):
      if reader.num_records() != count:
        raise _corrupt_shard(
            file, f"{reader.num_records()} of {count} records"
        )
    self._ends = np.cumsum(counts)
    self._starts = self._ends - counts
    # Readers have a file position, which fetches must not share.
    self._lock = threading.Lock()

  def __reduce__(self):
    return PreparedSource, (self._path, self._split)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    Args:
      indices: integers [n] in [0, len(self)), repeats allowed.

    Raises:
      IndexError: an index is out of range.
      UserError: a shard is corrupt.
    """
    indices = np.asarray(indices, np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(
          f"{self.name}: got indices {indices.min()} to {indices.max()},"
          f" expected 0 to {len(self) - 1}"
      )
    shard = np.searchsorted(self._ends, indices, side="right")
    position = indices - self._starts[shard]
    with self._lock:
      records = [
          self._read(k, p)
          for k, p in zip(shard.tolist(), position.tolist(), strict=True)
      ]
    rows = np.frombuffer(b"".join(records), np.uint8)
    rows = rows.reshape(len(indices), record_bytes(self.image_shape))
    label = rows[:, : _LABEL.itemsize].copy().view(_LABEL)[:, 0]
    image = rows[:, _LABEL.itemsize :].copy()
    return dict(
        image=image.reshape(len(indices), *self.image_shape),
        label=label.astype(np.int32),
    )

  def _read(self, shard: int, position: int) -> bytes:
    reader = self._readers[shard]
    try:
      reader.seek(position)
      record = reader.read()
    except RuntimeError as e:
      raise _corrupt_shard(self._files[shard], str(e)) from e
    expected = record_bytes(self.image_shape)
    if len(record) != expected:
      raise _corrupt_shard(
          self._files[shard], f"records of {len(record)} bytes, not {expected}"
      )
    return record


def _open(file: str) -> Any:
  try:
    return array_record_module.ArrayRecordReader(file, _READER_OPTIONS)
  except RuntimeError as e:
    raise _corrupt_shard(file, str(e)) from e


def _corrupt_shard(file: str, reason: str) -> errors.UserError:
  reason = " ".join(reason.split())[:160]
  return errors.UserError(
      f"{file}: corrupt ({reason}), expected an unmodified shard; copy it again"
      " or prepare the dataset again"
  )


def _check_sizes(path: str, shards: list[str], sizes: list[int]) -> None:
  missing = [os.path.basename(f) for f in shards if not os.path.isfile(f)]
  if missing:
    raise errors.UserError(
        f"{path}: {len(missing)} of {len(shards)} shards are missing:"
        f" {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy"
        " the whole folder, or prepare the dataset again"
    )
  for file, size in zip(shards, sizes, strict=True):
    if os.path.getsize(file) != size:
      raise _corrupt_shard(file, f"{os.path.getsize(file)} of {size} bytes")
