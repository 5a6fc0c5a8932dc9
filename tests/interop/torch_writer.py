"""Writes checkpoints as torch.save does, without torch.

A zip archive of data.pkl, one record per tensor, byteorder and version
(`torch.serialization` of torch 2); `torch.load(path, weights_only=True)` reads
it.
"""

import pathlib
import pickle
import struct
from typing import Any, BinaryIO
import zipfile

import numpy as np

from bcm_jax import errors
from bcm_jax.interop import torch_files

_STORAGE_OF = {dtype: name for name, dtype in torch_files.STORAGES.items()}
_FOLDER = "archive/"
_ALIGNMENT = 64


def save(path: str | pathlib.Path, tree: Any) -> str:
  """Writes a tree of dicts, lists, arrays, text and numbers; returns the path.
  """
  arrays = []

  def encode(value):
    if isinstance(value, np.ndarray):
      arrays.append(np.asarray(value, order="C"))
      return _tensor("x", str(len(arrays) - 1), arrays[-1])
    if isinstance(value, dict):
      items = b"".join(encode(k) + encode(v) for k, v in value.items())
      return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list):
      items = b"".join(map(encode, value))
      return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
    if isinstance(value, str):
      return _text(value)
    if isinstance(value, int):
      return _integer(value)
    return pickle.BINFLOAT + struct.pack(">d", value)

  content = pickle.PROTO + b"\x02" + encode(tree) + pickle.STOP
  with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
    _record(archive, file, "data.pkl", content)
    _record(archive, file, "byteorder", b"little")
    for key, array in enumerate(arrays):
      # Bytes, since zipfile does not know the dtypes of ml_dtypes.
      raw = array.reshape(-1).view(np.uint8).data
      _record(archive, file, f"data/{key}", raw)
    _record(archive, file, "version", b"3\n")
  return str(path)


def _record(
    archive: zipfile.ZipFile,
    file: BinaryIO,
    name: str,
    content: bytes | memoryview,
) -> None:
  # A fixed date, so that the same tensors give the same bytes.
  info = zipfile.ZipInfo(_FOLDER + name, date_time=(1980, 1, 1, 0, 0, 0))
  info.file_size = len(content)
  # Padding in the extra field puts the numbers at a multiple of 64 bytes,
  # where they can be mapped into memory: 30 bytes of header, the name, the
  # field's own header. Huge records have a longer one and stay unpadded.
  start = file.tell() + 30 + len(info.filename) + 4
  if len(content) < 1 << 30:
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
  with archive.open(info, "w") as record:
    record.write(content)


def _tensor(name: str, key: str, array: np.ndarray) -> bytes:
  """Returns _rebuild_tensor_v2(storage, 0, size, stride, False, {})."""
  if array.dtype not in _STORAGE_OF:
    raise errors.UserError(
        f"tensor {name!r} is {array.dtype}, which .pt files cannot hold"
        f" (known: {', '.join(d.name for d in _STORAGE_OF)}); convert it"
    )
  strides, step = [], 1
  for n in reversed(array.shape):
    strides.insert(0, step)
    step *= max(n, 1)
  storage = [
      *(pickle.MARK, _text("storage")),
      _global("torch", _STORAGE_OF[array.dtype]),
      *(_text(key), _text("cpu"), _integer(array.size)),
      *(pickle.TUPLE, pickle.BINPERSID),
  ]
  return b"".join([
      _global("torch._utils", "_rebuild_tensor_v2"),
      pickle.MARK,
      *storage,
      _integer(0),
      _integers(array.shape),
      _integers(strides),
      pickle.NEWFALSE,
      _global("collections", "OrderedDict"),
      *(pickle.EMPTY_TUPLE, pickle.REDUCE),
      *(pickle.TUPLE, pickle.REDUCE),
  ])


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
  encoded = text.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
  if value < 1 << 31:
    return pickle.BININT + struct.pack("<i", value)
  return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _integers(values) -> bytes:
  return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
