"""Weight files of any kind: one way in, one way out.

    weights = read("edm-cifar10.pkl")
    weights.groups["ema"]["model.map_layer0.weight"]
    write("weights.safetensors", tensors)
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import os
from typing import Any, BinaryIO

from flax import serialization
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from bcm_jax.errors import UserError
from bcm_jax.interop import edm_pickle
from bcm_jax.interop import torch_files
from bcm_jax.interop import torch_writer
from bcm_jax.interop import trees

_Groups = dict[str, dict[str, np.ndarray]]
_Read = tuple[_Groups, dict[str, Any]]

# The names of dtypes in safetensors; those of NumPy alone know no bfloat16.
_SAFETENSORS = {
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}

_NUMBERS = {*_SAFETENSORS.values(), np.dtype(np.complex128)}

# Entries of a Flax training state whose names are groups; without any of
# them, the file is one tree of parameters.
_FLAX_GROUPS = {"params", "params_ema", "target_params", "ema_params"}


@dataclasses.dataclass(frozen=True)
class WeightFile:
  """What a weight file holds.

  Attributes:
    kind: 'torch_zip', 'torch_legacy', 'edm_pickle', 'safetensors' or
      'flax_msgpack'.
    groups: {group: {name: array}}, never without a tensor. A plain state dict
      is the group ''; a checkpoint {'model': ..., 'ema': ...} has groups
      'model' and 'ema'; an EDM pickle has 'ema'; a Flax training state has
      'params', 'params_ema' and others, with names joined by '/', elsewhere
      by '.'. Arrays are as saved: dtype, layout and shape; do not write to
      them.
    metadata: plain values beside the tensors; for EDM pickles see
      `edm_pickle.read`.
  """

  kind: str
  groups: _Groups
  metadata: dict[str, Any]


def read(path: str) -> WeightFile:
  """Reads a weight file, whatever its name; its content tells the kind.

  Nothing in the file is executed or imported.

  Args:
    path: a local file.

  Raises:
    UserError: the file cannot be read, is of no known kind, damaged, cut
      short, or names code in a pickle; the message starts with the path.
  """
  try:
    with open(path, "rb") as file:
      kind = _kind(file)
      groups, metadata = _READERS[kind](file)
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
  except OSError as e:
    raise UserError(
        f"{path}: cannot be read ({e.strerror}); check the path"
    ) from None
  return WeightFile(kind, groups, metadata)


def write(path: str, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors, whole or not at all.

  Args:
    path: ends in '.safetensors' or '.pt'; the latter is what
      torch.load(path, weights_only=True) reads. Folders are made.
    tensors: arrays by name.

  Raises:
    UserError: another suffix, a name that is no text, or a dtype that the
      format cannot hold.
  """
  writers = {".safetensors": _write_safetensors, ".pt": torch_writer.write}
  suffix = os.path.splitext(path)[1]
  if suffix not in writers:
    raise UserError(
        f"{path}: suffix {suffix!r} is of no kind that can be written, expected"
        f" one of {', '.join(writers)}"
    )
  plain = {name: _plain(name, value) for name, value in tensors.items()}
  with _whole(path) as file:
    writers[suffix](file, plain)


def _plain(name: Any, value: Any) -> np.ndarray:
  """Returns a little-endian C-contiguous array of numbers."""
  if not isinstance(name, str):
    raise UserError(f"the name {name!r} of a tensor is no text; rename it")
  array = np.asarray(value, order="C")
  if array.dtype.byteorder == ">":
    array = array.astype(array.dtype.newbyteorder("<"))
  _check_numbers(name, array)
  return array


def _check_numbers(name: str, array: np.ndarray) -> None:
  if array.dtype not in _NUMBERS:
    raise UserError(
        f"tensor {name!r} is {array.dtype}, expected plain numbers; convert it"
    )


@contextlib.contextmanager
def _whole(path: str):
  """Yields a file that gets its name at the end, and goes if that fails."""
  path = os.path.abspath(path)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  try:
    with open(path + ".tmp", "wb") as file:
      yield file
    os.replace(path + ".tmp", path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path + ".tmp")
    raise


def _kind(file: BinaryIO) -> str:
  """Returns the kind that the first bytes tell; the file is rewound."""
  head = file.read(64)
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  if head[:4] == b"PK\x03\x04":
    return "torch_zip"
  if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
    return "safetensors"
  if torch_files.is_legacy(head):
    return "torch_legacy"
  if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
    return "edm_pickle"
  # A map of MessagePack that is not empty.
  if head[:1] in (b"\xde", b"\xdf") or head[:1] and 0x81 <= head[0] <= 0x8F:
    return "flax_msgpack"
  raise UserError(
      f"is of no known kind (it has {size} bytes and starts with {head[:8]!r});"
      " expected a file of torch.save, an EDM .pkl, .safetensors or Flax"
      " msgpack, whole"
  )


def _read_safetensors(file: BinaryIO) -> _Read:
  content = file.read()
  try:
    tensors = safetensors.deserialize(content)
    with safetensors.safe_open(file.name, framework="np") as opened:
      metadata = opened.metadata() or {}
  except safetensors.SafetensorError as e:
    raise UserError(
        f"is no whole .safetensors ({e}); copy or download it again"
    ) from None
  found = {}
  for name, view in tensors:
    if view["dtype"] not in _SAFETENSORS:
      raise UserError(
          f"tensor {name!r} is {view['dtype']}, which is not supported (known:"
          f" {', '.join(_SAFETENSORS)}); convert it"
      )
    flat = np.frombuffer(view["data"], _SAFETENSORS[view["dtype"]])
    found[name] = flat.reshape(view["shape"])
  if not found:
    raise UserError("the file holds no tensors")
  return {"": found}, metadata


def _write_safetensors(file: BinaryIO, tensors: dict[str, np.ndarray]) -> None:
  for name, array in tensors.items():
    if array.dtype not in _SAFETENSORS.values():
      raise UserError(
          f"tensor {name!r} is {array.dtype}, which .safetensors cannot hold"
          f" (known: {', '.join(_SAFETENSORS)}); convert it"
      )
  file.write(safetensors.numpy.save(tensors))


def _read_flax(file: BinaryIO) -> _Read:
  try:
    tree = serialization.msgpack_restore(file.read())
  except Exception as e:  # msgpack has no common ancestor for its errors.
    raise UserError(
        f"is no whole Flax msgpack ({type(e).__name__}: {str(e)[:80]}); copy or"
        " download it again"
    ) from None
  if type(tree) is not dict or not _FLAX_GROUPS & tree.keys():
    tree = {"": tree}
  # Counters are kept as arrays of no dimension.
  scalars = {
      key: value.item()
      for key, value in tree.items()
      if isinstance(value, np.ndarray) and not value.ndim
  }
  rest = {key: value for key, value in tree.items() if key not in scalars}
  groups, metadata = trees.groups_of(rest, "/")
  for group in groups.values():
    for name, array in group.items():
      _check_numbers(name, array)
  return groups, metadata | scalars


_READERS: dict[str, Callable[[BinaryIO], _Read]] = {
    "torch_zip": lambda f: trees.groups_of(torch_files.read_zip(f)),
    "torch_legacy": lambda f: trees.groups_of(
        torch_files.read_legacy(f.read())
    ),
    "edm_pickle": lambda f: edm_pickle.read(f.read()),
    "safetensors": _read_safetensors,
    "flax_msgpack": _read_flax,
}
