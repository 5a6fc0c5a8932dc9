"""Reads PyTorch's zip and legacy formats and EDM's pickles without torch.

Formats: `torch.serialization` and `torch._utils` of torch 2; the legacy format
of torch.save before version 1.6 or with _use_new_zipfile_serialization=False;
`torch_utils.persistence` of EDM (Karras et al., 2022), version 6, without its
embedded source code.
"""

import dataclasses
import math
import re
import struct
from typing import Any, BinaryIO
import zipfile

import ml_dtypes
import numpy as np

from bcm_jax import errors
from bcm_jax.utils import unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# Largest tensor that may repeat the numbers of a smaller storage (stride 0).
_MAX_EXPANDED = 1 << 20

# Dtypes of storages by class name in torch.
STORAGES = {f"{name}Storage": np.dtype(dtype) for name, dtype in dict(
    Float="f4", Double="f8", Half="f2", BFloat16=ml_dtypes.bfloat16, Char="i1",
    Short="i2", Int="i4", Long="i8", Byte="u1", Bool="?", ComplexFloat="c8",
    ComplexDouble="c16",
).items()}

# Dtypes since torch 2.1, saved in untyped storages.
_UNTYPED = {np.dtype(name) for name in (
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz"),
)}


@dataclasses.dataclass(eq=False)
class Storage:
  """A one-dimensional array, of which tensors are views.

  Attributes:
    key: name in the file.
    dtype: dtype of the elements; uint8 if untyped.
    numel: number of elements, as declared in the pickle.
    numbers: [numel], read-only; None before the record is read.
  """

  key: str
  dtype: np.dtype
  numel: int
  numbers: np.ndarray | None = None

  def fill(self, content: bytes, big_endian: bool = False) -> None:
    """Sets `numbers` from a record; UserError if its length is wrong."""
    unpickle.require(
        len(content) == self.numel * self.dtype.itemsize,
        f"storage {unpickle.shown(self.key)}: got {len(content)} bytes,"
        f" expected {self.numel} numbers of {self.dtype}",
    )
    raw = np.frombuffer(content, np.uint8)
    if big_endian:
      # Byte order applies to the real and imaginary parts separately.
      width = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
      raw = raw.view(f"u{width}").byteswap().view(np.uint8)
    # NumPy bools must be 0 or 1.
    is_bool = self.dtype == np.bool_
    self.numbers = raw != 0 if is_bool else raw.view(self.dtype)
    self.numbers.flags.writeable = False


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A view of a storage; offset and strides are in elements of `dtype`."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]
  dtype: np.dtype


def as_array(tensor: Tensor, name: str) -> np.ndarray:
  """Returns a tensor as a read-only array that shares its storage.

  Args:
    tensor: view of a storage.
    name: name of the tensor, for errors.

  Raises:
    UserError: the tensor exceeds its storage, or is expanded to more than
      2^20 elements.
  """
  size, stride, flat = tensor.size, tensor.stride, tensor.storage.numbers
  count, width = math.prod(size), tensor.dtype.itemsize
  # An empty tensor has no last element.
  last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  end = tensor.offset + (last + 1) * bool(count)
  problem = None
  if flat is None:
    problem = "is a view of a storage without a record"
  elif end * width > flat.nbytes:
    problem = (
        f"reaches element {unpickle.shown(end)} of a storage of"
        f" {flat.nbytes // width}"
    )
  elif count > max(flat.size, _MAX_EXPANDED) or (
      math.prod(n for n in size if n) >> 56
  ):
    problem = f"expands {flat.size} stored numbers"
  if problem:
    raise errors.UserError(
        f"tensor {unpickle.shown(name)}: got size {unpickle.shown(size)} and"
        f" stride {unpickle.shown(stride)}, which {problem}; save a contiguous"
        " copy, or copy the file again"
    )
  if not count:
    return np.empty(size, tensor.dtype)
  # The stride of an axis of length 1 has no effect and may be any number.
  steps = [s * width if n > 1 else 0 for n, s in zip(size, stride, strict=True)]
  raw = flat.view(np.uint8)
  return np.ndarray(size, tensor.dtype, raw, tensor.offset * width, steps)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any):
  """Replaces _rebuild_tensor and _rebuild_tensor_v2."""
  # A legacy storage that is a view of another storage is a Tensor here.
  is_view = isinstance(storage, Tensor)
  root, start = (storage.storage, storage.offset) if is_view else (storage, 0)
  # rest: requires_grad, hooks, flags of lazy conjugation and negation.
  unpickle.require(
      isinstance(root, Storage),
      f"storage of a tensor: got {unpickle.shown(root)}, expected a storage",
  )
  unpickle.require(
      not any(rest[2:3]),
      "a tensor: got a lazy conjugation or negation, expected none",
  )
  (offset,) = unpickle.counts((offset,), "offset of a tensor")
  size = unpickle.counts(size, "size of a tensor")
  stride = unpickle.counts(stride, "stride of a tensor")
  unpickle.require(
      len(size) == len(stride),
      f"a tensor: got size {size} and stride {stride}, expected equal lengths",
  )
  return Tensor(root, start + offset, size, stride, root.dtype)


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, *rest):
  """Replaces _rebuild_tensor_v3, for dtypes in untyped storages."""
  tensor = _tensor(storage, offset, size, stride, grad, hooks, *rest)
  untyped = tensor.dtype == np.uint8 and dtype.value in _UNTYPED
  unpickle.require(
      untyped, f"dtype of a tensor: got {unpickle.shown(dtype)} without support"
  )
  return dataclasses.replace(tensor, dtype=dtype.value)


def _parameter(data: Any, *_: Any) -> Tensor:
  """Replaces Parameter: returns its tensor."""
  unpickle.require(
      isinstance(data, Tensor),
      f"a parameter: got {unpickle.shown(data)}, expected a tensor",
  )
  return data


def _with_attributes(function: Any, _: Any, args: Any, *__: Any) -> Tensor:
  """Replaces _rebuild_from_type_v2, without the Python attributes."""
  rebuilds = (_tensor, _tensor_v3, _parameter)
  unpickle.require(
      function.make in rebuilds,
      f"class of a tensor: got {unpickle.shown(function)}, expected"
      " torch.Tensor",
  )
  return function.make(*args)


def _persistent(meta: Any) -> unpickle.Object:
  """Replaces EDM's persistent objects, without their source code."""
  has_class = type(meta) is dict and type(meta.get("class_name")) is str
  unpickle.require(has_class, "persistent object: got none with a class name")
  return unpickle.Object(meta["class_name"], meta.get("state"))


def _device(*args: Any) -> str:
  """Replaces torch.device by its name."""
  return ":".join(a if type(a) is str else unpickle.shown(a) for a in args)


_GLOBALS = unpickle.GLOBALS | {entry.name: entry for entry in (
    *(unpickle.Global(name, make) for name, make in (
        ("torch._utils._rebuild_tensor", _tensor),
        ("torch._utils._rebuild_tensor_v2", _tensor),
        ("torch._utils._rebuild_tensor_v3", _tensor_v3),
        ("torch._utils._rebuild_parameter", _parameter),
        ("torch._utils._rebuild_parameter_with_state", _parameter),
        ("torch._tensor._rebuild_from_type_v2", _with_attributes),
        ("torch.nn.parameter.Parameter", _parameter),
        ("torch.nn.parameter.Buffer", None),
        ("torch.Tensor", None),
        ("torch.Size", lambda size=(): unpickle.counts(size, "torch.Size")),
        ("torch.device", _device),
        ("torch_utils.persistence._reconstruct_persistent_obj", _persistent),
        ("dnnlib.EasyDict", unpickle.make_dict),
        ("dnnlib.util.EasyDict", unpickle.make_dict),
    )),
    *(unpickle.Global(f"torch.{name}", None, dtype) for name, dtype in (
        *STORAGES.items(),
        *((f"cuda.{name}", dtype) for name, dtype in STORAGES.items()),
        *((dtype.name, dtype) for dtype in (*STORAGES.values(), *_UNTYPED)),
        ("UntypedStorage", np.dtype(np.uint8)),
        ("storage.UntypedStorage", np.dtype(np.uint8)),
    )),
)}


def _lookup(dotted: str) -> unpickle.Global | None:
  """Returns the stand-in for a global of weight files, or None."""
  module, _, name = dotted.rpartition(".")
  if dotted.startswith("torch.nn.modules."):
    return unpickle.Global(
        dotted, lambda: unpickle.Object(name), unpickle.Object
    )
  # Functions that are attributes of networks, such as activations.
  if module in ("torch.nn.functional", "torch._C._nn"):
    return unpickle.Global(dotted)
  return _GLOBALS.get(dotted)


def _declared(pid: Any, length: int, storages: dict[str, Storage]) -> Storage:
  """Returns the storage of a persistent id ('storage', type, key, place, n)."""
  complete = type(pid) is tuple and len(pid) == length
  tag, kind, key, _, numel = pid[:5] if complete else (None,) * 5
  unpickle.require(
      tag == "storage" and isinstance(kind, unpickle.Global)
      and isinstance(kind.value, np.dtype)
      and type(key) is str and type(numel) is int and 0 <= numel < 1 << 60,
      f"persistent id: got {unpickle.shown(pid)}, expected a storage",
  )
  storage = storages.setdefault(
      key, Storage(unpickle.key(key), kind.value, numel)
  )
  unpickle.require(
      (storage.dtype, storage.numel) == (kind.value, numel),
      f"storage {unpickle.shown(key)}: got two different declarations, expected"
      " one",
  )
  return storage


class _Archive:
  """A zip archive of torch.save and its storages that were read."""

  def __init__(self, archive: zipfile.ZipFile, size: int):
    self.archive, self.bytes_left = archive, size
    self.infos = {info.filename: info for info in archive.infolist()}
    self.storages: dict[str, Storage] = {}
    pickles = [n for n in self.infos if re.fullmatch(r"[^/]*/data\.pkl", n)]
    unpickle.require(
        len(pickles) == 1,
        f"zip archive: got {len(pickles)} records */data.pkl, expected one",
    )
    self.folder = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(self.folder + "code/") for name in self.infos):
      raise errors.UserError(
          "file: got TorchScript, which is code, expected weights; save the"
          " state_dict() of the model with torch.save"
      )
    order = b"little"  # torch before 2.1 does not write the byte order.
    if self.folder + "byteorder" in self.infos:
      order = self.record("byteorder").strip()
    unpickle.require(
        order in (b"little", b"big"),
        f"byteorder: got {unpickle.shown(order)}, expected b'little' or b'big'",
    )
    self.big_endian = order == b"big"

  def record(self, name: str) -> bytes:
    """Returns the bytes of a record after verifying its checksum."""
    info = self.infos.get(self.folder + name)
    where = f"record {unpickle.shown(name)}: got"
    unpickle.require(info, f"{where} none, expected one")
    is_stored = info.compress_type == zipfile.ZIP_STORED
    unpickle.require(
        is_stored and not info.flag_bits & 1,
        f"{where} compressed or encrypted data, expected stored data",
    )
    # Overlapping records could need far more memory than the file has bytes.
    self.bytes_left -= info.file_size
    unpickle.require(
        self.bytes_left >= 0,
        f"{where} {info.file_size} bytes, expected at most those of the file",
    )
    return self.archive.read(info)

  def persistent(self, pid: Any) -> Storage:
    """Returns the storage of a persistent id; reads its record once."""
    storage = _declared(pid, 5, self.storages)
    if storage.numbers is None:
      storage.fill(self.record(f"data/{storage.key}"), self.big_endian)
    return storage


def read_zip(file: BinaryIO) -> Any:
  """Reads a file of torch.save.

  Args:
    file: seekable zip archive.

  Returns:
    The saved object: a tree of dicts, lists, `Tensor`, `unpickle.Object` and
    plain values.

  Raises:
    UserError: a corrupt, truncated, compressed or other archive, or a pickle
      that could run code.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      records = _Archive(archive, file.seek(0, 2))
      reader = unpickle.Reader(records.record("data.pkl"))
      return unpickle.Unpickler(reader, _lookup, records.persistent).load()
  except (errors.UserError, MemoryError):
    raise
  except Exception as e:  # zipfile raises various exceptions.
    raise errors.UserError(
        f"zip archive: cannot be read ({unpickle.shown(str(e))}), expected a"
        " whole file of torch.save; copy or download it again"
    ) from None


def is_legacy(head: bytes) -> bool:
  """Returns whether `head`, the first bytes of a file, is in legacy format."""
  return head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:40]


def read_legacy(content: bytes) -> Any:
  """Reads a file of torch.save(..., _use_new_zipfile_serialization=False).

  Args:
    content: bytes of the file.

  Returns:
    The saved object, see `read_zip`.

  Raises:
    UserError: see `read_zip`.
  """
  reader = unpickle.Reader(content)
  storages: dict[str, Storage] = {}

  def persistent(pid: Any) -> Any:
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
      return pid[1]  # Class of a pickled module; its source code is ignored.
    storage = _declared(pid, 6, storages)
    if pid[5] is None:
      return storage
    # A view of another storage (torch 0.3 and older).
    _, start, numel = pid[5]
    start, numel = unpickle.counts((start, numel), "view of a storage")
    return Tensor(storage, start, (numel,), (1,), storage.dtype)

  for field, expected in (("magic number", _MAGIC), ("version", _PROTOCOL)):
    value = unpickle.Unpickler(reader, _lookup).load()
    unpickle.require(
        type(value) is int and value == expected,
        f"{field}: got {unpickle.shown(value)}, expected {expected}",
    )
  # Skips byte order and sizes of C types of the writing machine.
  unpickle.Unpickler(reader, _lookup).load()
  tree = unpickle.Unpickler(reader, _lookup, persistent).load()
  keys = unpickle.Unpickler(reader, _lookup).load()
  for key in keys if type(keys) is list else [None]:
    where = f"storage {unpickle.shown(key)}: got"
    is_declared = type(key) is str and key in storages
    unpickle.require(is_declared, f"{where} no tensor, expected at least one")
    storage = storages[key]
    (numel,) = struct.unpack("<q", reader.read(8))
    unpickle.require(
        numel == storage.numel and storage.numbers is None,
        f"{where} {numel} numbers, expected {storage.numel} and only once",
    )
    # Storages are little-endian on all machines.
    storage.fill(reader.read(numel * storage.dtype.itemsize))
  return tree


def _nested_storage(content: Any) -> Storage:
  """Replaces torch.storage._load_from_bytes."""
  is_file = type(content) is bytes and is_legacy(content[:64])
  storage = read_legacy(content) if is_file else content
  unpickle.require(
      isinstance(storage, Storage),
      f"nested file: got {unpickle.shown(storage)}, expected a storage",
  )
  return storage


def read_pickle(content: bytes) -> Any:
  """Reads a pickle of EDM; see `read_zip` for the result and errors."""
  # Storages are nested legacy files, only in this format.
  name = "torch.storage._load_from_bytes"
  nested = {name: unpickle.Global(name, _nested_storage)}
  return unpickle.Unpickler(
      unpickle.Reader(content), lambda name: nested.get(name) or _lookup(name)
  ).load()
