"""A state dict written as torch.save writes it, without torch.

`torch.load(path, weights_only=True)` reads it: a zip archive of data.pkl, one
record a tensor, byteorder and version (`torch.serialization` of torch 2).
"""

from collections.abc import Mapping
import pickle
import struct
from typing import BinaryIO
import zipfile

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop.torch_pickle import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_FOLDER = "archive/"
_ALIGNMENT = 64


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors as an OrderedDict of torch tensors.

  Args:
    file: open for writing, seekable.
    tensors: little-endian, C-contiguous arrays of any shape, by name.

  Raises:
    UserError: a dtype that torch has no storage for.
  """
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    _record(archive, file, "data.pkl", _pickle(tensors))
    _record(archive, file, "byteorder", b"little")
    for key, array in enumerate(tensors.values()):
      # A view as bytes, since zipfile has no use for ml_dtypes.
      raw = array.reshape(-1).view(np.uint8).data
      _record(archive, file, f"data/{key}", raw)
    _record(archive, file, "version", b"3\n")


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


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
  """Returns protocol 2 of OrderedDict({name: tensor}), without a memo."""
  parts = [pickle.PROTO + b"\x02", _global("collections", "OrderedDict")]
  parts += [pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.MARK]
  for key, (name, array) in enumerate(tensors.items()):
    parts += [_text(name), _tensor(name, str(key), array)]
  return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _tensor(name: str, key: str, array: np.ndarray) -> bytes:
  """Returns _rebuild_tensor_v2(storage, 0, size, stride, False, {})."""
  if array.dtype not in _STORAGE_OF:
    raise UserError(
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
