"""Images as the prepare command writes them: raw pixels, read by index.

A folder with array_record shards and a dataset.json. A record is the label as
a little-endian int32, then the pixels as uint8 [H, W, C]; nothing is decoded.
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
# Records one by one and as they are: random access, no decompression.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# Reading ahead would read neighbours that a shuffled batch does not want, and
# handing a record of a few KB to another thread costs more than reading it.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_LABEL = np.dtype("<i4")


def record_bytes(image_shape: tuple[int, int, int]) -> int:
  """Returns the length of a record."""
  return _LABEL.itemsize + math.prod(image_shape)


def is_prepared(path: str) -> bool:
  """Returns whether a folder holds a dataset.json of this format."""
  try:
    with open(os.path.join(path, MANIFEST), encoding="utf-8") as f:
      return json.load(f)["format"] == FORMAT
  except (OSError, ValueError, KeyError, TypeError):
    return False


def read_manifest(path: str) -> dict[str, Any]:
  """Returns the dataset.json of a prepared folder.

  Raises:
    UserError: there is none, or not of this format and version.
  """
  file = os.path.join(path, MANIFEST)
  try:
    with open(file, encoding="utf-8") as f:
      manifest = json.load(f)
  except FileNotFoundError as e:
    raise errors.UserError(
        f"{path} holds no {MANIFEST}, expected a folder made by python -m"
        " bcm_jax.data.prepare; correct data.path, or set data.name to 'folder'"
        " for images"
    ) from e
  except (OSError, ValueError) as e:
    raise errors.UserError(
        f"{file} cannot be read ({type(e).__name__}: {e}); prepare the data set"
        " again"
    ) from e
  made = (None, None)
  if isinstance(manifest, dict):
    made = (manifest.get("format"), manifest.get("version"))
  if made != (FORMAT, VERSION):
    raise errors.UserError(
        f"{file} is of format {made[0]!r}, version {made[1]}, expected"
        f" {FORMAT!r}, version {VERSION}; prepare the data set again"
    )
  return manifest


def write_manifest(path: str, **content: Any) -> None:
  """Writes dataset.json, the last file of a prepared folder."""
  files.write_json(
      os.path.join(path, MANIFEST),
      {"format": FORMAT, "version": VERSION} | content,
  )


def data_set(path: str) -> dataset_spec.DataSet:
  """Describes a prepared folder from its dataset.json.

  Raises:
    UserError: see `read_manifest`.
  """
  manifest = read_manifest(path)
  splits = tuple(manifest["splits"])
  names = manifest["class_names"]

  def open_split(split, data_dir=None):
    del data_dir  # Of TFDS.
    dataset_spec.check_split(split, splits, path)
    return PreparedSource(path, split)

  return dataset_spec.DataSet(
      tuple(manifest["image_shape"]), manifest["num_classes"], open_split,
      splits, None if names is None else tuple(names),
  )


class ShardWriter:
  """Writes one shard.

  Args:
    path: of the file.
  """

  def __init__(self, path: str):
    self._path, self._count = path, 0
    self._writer = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)

  def write(self, image: np.ndarray, label: np.ndarray) -> None:
    """Appends examples: image uint8 [n, H, W, C], label int32 [n]."""
    rows = np.concatenate(
        [
            label.astype(_LABEL)[:, None].view(np.uint8),
            image.reshape(len(image), math.prod(image.shape[1:])),
        ],
        axis=1,
    )
    for row in rows:
      self._writer.write(row.tobytes())
    self._count += len(rows)

  def close(self) -> dict[str, Any]:
    """Finishes the file and returns its entry in dataset.json."""
    self._writer.close()
    with open(self._path, "rb") as f:
      digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {
        "file": os.path.basename(self._path),
        "count": self._count,
        "bytes": os.path.getsize(self._path),
        "sha256": digest,
    }


class PreparedSource:
  """A `Source` over one split of a prepared folder; see data.source.

  Args:
    path: the folder.
    split: one of those in its dataset.json.

  Raises:
    UserError: shards that are missing, or not as long as dataset.json says.
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
        raise _damaged(file, f"{reader.num_records()} records of {count}")
    self._ends = np.cumsum(counts)
    self._starts = self._ends - counts
    # A reader has a place where it stands.
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
      IndexError: an index outside of that range.
      UserError: a damaged shard.
    """
    indices = np.asarray(indices, np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(
          f"{self.name}: index {indices.min()} or {indices.max()} is not in 0"
          f" to {len(self) - 1}"
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
      return reader.read()
    except RuntimeError as e:
      raise _damaged(self._files[shard], str(e)) from e


def _open(file: str) -> Any:
  try:
    return array_record_module.ArrayRecordReader(file, _READER_OPTIONS)
  except RuntimeError as e:
    raise _damaged(file, str(e)) from e


def _damaged(file: str, reason: str) -> errors.UserError:
  reason = " ".join(reason.split())[:160]
  return errors.UserError(
      f"{file} is damaged ({reason}), expected the file as it was prepared;"
      " copy it anew or prepare the data set again"
  )


def _check_sizes(path: str, shards: list[str], sizes: list[int]) -> None:
  missing = [os.path.basename(f) for f in shards if not os.path.isfile(f)]
  if missing:
    raise errors.UserError(
        f"{path} lacks {len(missing)} of {len(shards)} shards:"
        f" {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy"
        " the whole folder, or prepare the data set again"
    )
  for file, size in zip(shards, sizes, strict=True):
    if os.path.getsize(file) != size:
      raise _damaged(file, f"{os.path.getsize(file)} bytes of {size}")
