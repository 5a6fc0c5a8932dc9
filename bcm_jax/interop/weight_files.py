"""Reads weight files of several formats and writes .safetensors.

    weights = read("edm-cifar10.pkl")
    weights.groups["ema"]["model.map_layer0.weight"]
    write("weights.safetensors", tensors)
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import os
import re
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

# Dtypes by name in safetensors.
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

# Entries of a Flax training state that become groups; a file without them is a
# single parameter tree.
_MAX_INDEX = 64 << 20  # Bytes of an index file.
_FLAX_GROUPS = {"params", "params_ema", "target_params", "ema_params"}


@dataclasses.dataclass(frozen=True)
class WeightFile:
  """Content of a weight file.

  Attributes:
    kind: 'torch_zip', 'torch_legacy', 'edm_pickle', 'safetensors' or
      'flax_msgpack'.
    groups: {group: {name: array}}, at least one tensor per group. A plain
      state dict is the group ''; a checkpoint {'model': ..., 'ema': ...} has
      groups 'model' and 'ema'; an EDM pickle has 'ema'; a Flax training state
      has 'params', 'params_ema' and others. Parts of a name are joined by '/'
      for Flax, else by '.'. Arrays are read-only and have the dtype, layout
      and shape of the file.
    metadata: plain values in addition to the tensors; for EDM pickles see
      `trees.network_of`.
  """

  kind: str
  groups: _Groups
  metadata: dict[str, Any]


def read(path: str) -> WeightFile:
  """Reads a weight file; detects its format from the content.

  The file name is ignored, except that of a shard. Nothing in the file is
  executed or imported.

  Args:
    path: local file; the index file of a model in several shards reads them
      all.

  Raises:
    UserError: the file is not readable, of an unknown format, corrupt,
      truncated, or a pickle that could run code; the message starts with the
      path.
  """
  _check_path(path)
  try:
    with open(path, "rb") as file:
      if file.peek(1)[:1] == b"{":
        return _read_shards(path, _read_index(file))
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
        f"{path}: does not fit into memory; use a machine with more memory, or"
        " check whether the file is corrupt"
    ) from None
  return WeightFile(kind, groups, metadata)


def _check_path(path: str) -> None:
  """Raises UserError for an address, a folder or a single shard."""
  if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path):
    raise errors.UserError(
        f"{path}: got an address, expected a local file; download it first"
    )
  if os.path.isdir(path):
    raise errors.UserError(
        f"{path}: cannot be read, got a folder, expected a weight file; name a "
        "file in it, of a model in several shards its .index.json"
    )
  if "\0" in path or os.path.exists(path) and not os.path.isfile(path):
    raise errors.UserError(
        f"{unpickle.shown(path)}: got no regular file, expected a weight file"
    )
  shard = re.search(r"-(\d+)-of-(\d+)\.[a-z]+$", path)
  if shard and int(shard[2]) > 1:
    raise errors.UserError(
        f"{path}: got shard {int(shard[1])} of {int(shard[2])}, expected a "
        "whole file; convert the index file beside it, such as "
        "model.safetensors.index.json"
    )


def _read_index(file: BinaryIO) -> dict[str, str]:
  """Returns {tensor: shard} of an index file; UserError for another file."""
  content = file.read(_MAX_INDEX + 1)
  try:
    index = json.loads(content) if len(content) <= _MAX_INDEX else None
  except (ValueError, RecursionError):
    index = None
  names = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(names, dict) or not names or not all(
      isinstance(shard, str) for shard in names.values()
  ):
    raise errors.UserError(
        "got JSON or text without a weight_map of names, expected a weight "
        "file or the index file of shards"
    )
  return names


def _read_shards(path: str, names: Mapping[str, str]) -> WeightFile:
  """Reads all shards of an index file of Hugging Face.

  Args:
    path: index file.
    names: {tensor: shard}.

  Raises:
    UserError: a shard outside of its folder, or tensors other than those of the
      index.
  """
  shards = sorted(set(names.values()))
  tensors, metadata, kind = {}, {}, None
  for shard in shards:
    is_name = os.path.basename(shard) == shard and "\0" not in shard
    if not is_name or shard in ("", ".", ".."):
      raise errors.UserError(
          f"weight_map: got the shard {unpickle.shown(shard)}, expected a file "
          "beside the index file"
      )
    place = os.path.join(os.path.dirname(path), shard)
    try:
      with open(place, "rb") as file:
        kind = _kind(file)
        groups, more = _READERS[kind](file)
    except OSError as e:
      raise errors.UserError(
          f"shard {shard}: cannot be read ({e.strerror}), expected it beside "
          "the index file; download it"
      ) from None
    metadata |= more
    for group in groups.values():
      wrong = sorted(n for n in group if names.get(n) != shard)
      if wrong:
        raise errors.UserError(
            f"shard {shard}: got tensor {unpickle.shown(wrong[0])}, which the "
            "index file does not list there; download both again"
        )
      tensors |= group
  missing = sorted(names.keys() - tensors.keys())
  if missing:
    raise errors.UserError(
        f"shards: got no tensor {unpickle.shown(missing[0])}, expected all of "
        "the index file; download them again"
    )
  return WeightFile(kind, {"": tensors}, metadata)


def check_suffix(path: str) -> None:
  """Raises UserError for a path without the suffix .safetensors."""
  if not path.endswith(".safetensors"):
    raise errors.UserError(
        f"{path}: got suffix {os.path.splitext(path)[1]!r}, expected"
        " .safetensors; PyTorch loads it with safetensors.torch.load_file"
    )


def write(path: str, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors atomically.

  Args:
    path: path with suffix '.safetensors'; its folders are created.
    tensors: arrays by name.

  Raises:
    UserError: another suffix, a name that is not a string, or a dtype that
      safetensors does not support.
  """
  check_suffix(path)
  arrays = {}
  for name, value in tensors.items():
    if not isinstance(name, str):
      raise errors.UserError(f"name of a tensor: got {name!r}, expected text")
    array = np.asarray(value, order="C")
    if array.dtype.byteorder == ">":
      array = array.astype(array.dtype.newbyteorder("<"))
    if array.dtype not in _SAFETENSORS.values():
      raise errors.UserError(
          f"tensor {name!r}: got {array.dtype}, expected one of"
          f" {', '.join(_SAFETENSORS)}; convert it"
      )
    arrays[name] = array
  files.write_bytes(os.path.abspath(path), safetensors.numpy.save(arrays))


# First bytes of other files.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not weights; fetch them "
    "with git lfs pull",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"GGUF": "a GGUF file, which has other names",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}


def _kind(file: BinaryIO) -> str:
  """Returns the format of a file from its first bytes; rewinds the file."""
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
  # Nonempty map of MessagePack.
  if head[:1] in (b"\xde", b"\xdf") or head[:1] and 0x81 <= head[0] <= 0x8F:
    return "flax_msgpack"
  what = next((v for k, v in _OTHERS.items() if head.startswith(k)), None)
  if head.lstrip()[:1] == b"<":
    what = (
        "a page of HTML or XML, not weights; the download needs another "
        "address or a login"
    )
  if what:
    raise errors.UserError(
        f"got {what}, expected a whole file of torch.save, an EDM .pkl, "
        ".safetensors or Flax msgpack"
    )
  raise errors.UserError(
      f"got {size} bytes that start with {head[:8]!r}, expected a whole file of"
      " torch.save, an EDM .pkl, .safetensors or Flax msgpack"
  )


def _read_safetensors(file: BinaryIO) -> _Read:
  """Reads .safetensors: (groups, metadata)."""
  try:
    # Compares the header with the file size before reading the tensors.
    with safetensors.safe_open(file.name, framework="np") as opened:
      metadata = opened.metadata() or {}
    tensors = safetensors.deserialize(file.read())
  except safetensors.SafetensorError as e:
    raise errors.UserError(
        f"cannot be read ({unpickle.shown(str(e))}), expected a whole"
        " .safetensors file; copy or download it again"
    ) from None
  group = {}
  for name, view in tensors:
    if view["dtype"] not in _SAFETENSORS:
      raise errors.UserError(
          f"tensor {name!r}: got {view['dtype']}, expected one of"
          f" {', '.join(_SAFETENSORS)}; convert it"
      )
    flat = np.frombuffer(view["data"], _SAFETENSORS[view["dtype"]])
    shape = unpickle.counts(view["shape"], f"shape of tensor {name!r}")
    unpickle.require(
        not math.prod(n for n in shape if n) >> 56,
        f"tensor {name!r}: got shape {shape}, expected less than 2^56 elements",
    )
    group[name] = flat.reshape(shape)
  if not group:
    raise errors.UserError("file: got no tensors, expected at least one")
  return {"": group}, metadata


def _read_flax(file: BinaryIO) -> _Read:
  """Reads Flax msgpack: (groups, metadata)."""
  try:
    tree = serialization.msgpack_restore(file.read())
  except Exception as e:  # msgpack raises various exceptions.
    raise errors.UserError(
        f"cannot be read ({type(e).__name__}: {unpickle.shown(str(e))}),"
        " expected a whole Flax msgpack; copy or download it again"
    ) from None
  if type(tree) is not dict or not _FLAX_GROUPS & tree.keys():
    tree = {"": tree}
  # Counters are saved as zero-dimensional arrays.
  scalars = {
      key: value.item()
      for key, value in tree.items()
      if isinstance(value, np.ndarray) and not value.ndim
  }
  arrays = {key: value for key, value in tree.items() if key not in scalars}
  groups, metadata = trees.groups_of(arrays, "/")
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
