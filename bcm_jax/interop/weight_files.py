"""Reads weight files of all kinds and writes .safetensors.

    weights = read("edm-cifar10.pkl")
    weights.groups["ema"]["model.map_layer0.weight"]
    write("weights.safetensors", tensors)
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from typing import Any, BinaryIO

from flax import serialization
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from bcm_jax import errors
from bcm_jax.interop import torch_files
from bcm_jax.interop import trees
from bcm_jax.utils import files
from bcm_jax.utils import unpickle

_Groups = dict[str, dict[str, np.ndarray]]
_Read = tuple[_Groups, dict[str, Any]]

# Dtypes by their names in safetensors.
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

# Entries of a Flax training state whose names are groups; a file without any
# of them is one tree of parameters.
_FLAX_GROUPS = {"params", "params_ema", "target_params", "ema_params"}


@dataclasses.dataclass(frozen=True)
class WeightFile:
  """Content of a weight file.

  Attributes:
    kind: 'torch_zip', 'torch_legacy', 'edm_pickle', 'safetensors' or
      'flax_msgpack'.
    groups: {group: {name: array}}, never without a tensor. A plain state dict
      is the group ''; a checkpoint {'model': ..., 'ema': ...} has groups
      'model' and 'ema'; an EDM pickle has 'ema'; a Flax training state has
      'params', 'params_ema' and others, with names joined by '/', elsewhere
      by '.'. Arrays are as saved: dtype, layout and shape; do not write to
      them.
    metadata: plain values besides the tensors; for EDM pickles see
      `trees.network_of`.
  """

  kind: str
  groups: _Groups
  metadata: dict[str, Any]


def read(path: str) -> WeightFile:
  """Reads a weight file, whose kind follows from its content.

  The name of the file is ignored, and nothing in it is executed or imported.

  Args:
    path: a local file.

  Raises:
    UserError: the file cannot be read, is of no known kind, damaged, cut
      short, or a pickle that could run code; the message starts with the path.
  """
  try:
    with open(path, "rb") as file:
      kind = _kind(file)
      groups, metadata = _READERS[kind](file)
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from None
  except OSError as e:
    raise errors.UserError(
        f"{path}: cannot be read ({e.strerror}); check the path"
    ) from None
  except MemoryError:
    raise errors.UserError(
        f"{path}: does not fit into memory; use a machine with more, or check"
        " whether the file is damaged"
    ) from None
  return WeightFile(kind, groups, metadata)


def check_suffix(path: str) -> None:
  """Raises UserError for a path that `write` does not write."""
  if not path.endswith(".safetensors"):
    raise errors.UserError(
        f"{path}: got suffix {os.path.splitext(path)[1]!r}, expected"
        " .safetensors; PyTorch loads it with safetensors.torch.load_file"
    )


def write(path: str, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors atomically.

  Args:
    path: ends in '.safetensors'; its folders are created.
    tensors: arrays by name.

  Raises:
    UserError: another suffix, a name that is not text, or a dtype that the
      format cannot hold.
  """
  check_suffix(path)
  plain = {}
  for name, value in tensors.items():
    if not isinstance(name, str):
      raise errors.UserError(f"name of a tensor: got {name!r}; expected text")
    array = np.asarray(value, order="C")
    if array.dtype.byteorder == ">":
      array = array.astype(array.dtype.newbyteorder("<"))
    if array.dtype not in _SAFETENSORS.values():
      raise errors.UserError(
          f"tensor {name!r}: got {array.dtype}, expected one of"
          f" {', '.join(_SAFETENSORS)}; convert it"
      )
    plain[name] = array
  files.write_bytes(os.path.abspath(path), safetensors.numpy.save(plain))


def _kind(file: BinaryIO) -> str:
  """Returns the kind of a file from its first bytes, and rewinds it."""
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
  raise errors.UserError(
      f"is of no known kind (it has {size} bytes and starts with {head[:8]!r});"
      " expected a whole file of torch.save, an EDM .pkl, .safetensors or Flax"
      " msgpack"
  )


def _read_safetensors(file: BinaryIO) -> _Read:
  try:
    # Checks the header against the file's length before anything is read.
    with safetensors.safe_open(file.name, framework="np") as opened:
      metadata = opened.metadata() or {}
    tensors = safetensors.deserialize(file.read())
  except safetensors.SafetensorError as e:
    raise errors.UserError(
        f"is no whole .safetensors ({unpickle.shown(str(e))}); copy or download"
        " it again"
    ) from None
  found = {}
  for name, view in tensors:
    if view["dtype"] not in _SAFETENSORS:
      raise errors.UserError(
          f"tensor {name!r} is {view['dtype']}, which is not supported (known:"
          f" {', '.join(_SAFETENSORS)}); convert it"
      )
    flat = np.frombuffer(view["data"], _SAFETENSORS[view["dtype"]])
    shape = unpickle.counts(view["shape"], f"shape of tensor {name!r}")
    unpickle.require(
        not math.prod(n for n in shape if n) >> 56,
        f"tensor {name!r} is of shape {shape}",
    )
    found[name] = flat.reshape(shape)
  if not found:
    raise errors.UserError("the file holds no tensors")
  return {"": found}, metadata


def _read_flax(file: BinaryIO) -> _Read:
  try:
    tree = serialization.msgpack_restore(file.read())
  except Exception as e:  # msgpack has no common ancestor for its errors.
    raise errors.UserError(
        f"is no whole Flax msgpack ({type(e).__name__}:"
        f" {unpickle.shown(str(e))}); copy or download it again"
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
      if array.dtype not in _NUMBERS:
        raise errors.UserError(
            f"tensor {name!r}: got {array.dtype}, expected plain numbers"
        )
  return groups, metadata | scalars


_READERS: dict[str, Callable[[BinaryIO], _Read]] = {
    "torch_zip": lambda f: trees.groups_of(torch_files.read_zip(f)),
    "torch_legacy": lambda f: trees.groups_of(
        torch_files.read_legacy(f.read())
    ),
    "edm_pickle": lambda f: trees.network_of(torch_files.read_pickle(f.read())),
    "safetensors": _read_safetensors,
    "flax_msgpack": _read_flax,
}
