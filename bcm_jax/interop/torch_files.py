"""PyTorch's zip and legacy files and EDM's pickles, read without torch.

Formats: `torch.serialization` and `torch._utils` of torch 2; the legacy one is
that of torch.save before 1.6 or with _use_new_zipfile_serialization=False;
`torch_utils.persistence` of EDM (Karras et al., 2022), version 6, whose source
code is skipped.
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

# An expanded tensor repeats few numbers; no weight repeats this many.
_MAX_EXPANDED = 1 << 20

# Dtypes of storages by their names in torch.
STORAGES = {f"{name}Storage": np.dtype(dtype) for name, dtype in dict(
    Float="f4", Double="f8", Half="f2", BFloat16=ml_dtypes.bfloat16, Char="i1",
    Short="i2", Int="i4", Long="i8", Byte="u1", Bool="?", ComplexFloat="c8",
    ComplexDouble="c16",
).items()}

# Dtypes since torch 2.1, kept in storages of bytes.
_UNTYPED = {np.dtype(name) for name in (
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz"),
)}


@dataclasses.dataclass(eq=False)
class Storage:
  """One-dimensional numbers, of which tensors are views.

  Attributes:
    key: its name in the file.
    dtype: of the numbers; uint8 if untyped.
    numel: number of elements as declared in the pickle.
    numbers: [numel], read-only; None until the file's record was read.
  """

  key: str
  dtype: np.dtype
  numel: int
  numbers: np.ndarray | None = None

  def fill(self, content: bytes, big_endian: bool = False) -> None:
    """Takes the record's bytes; UserError if they are not `numel` numbers."""
    unpickle.require(
        len(content) == self.numel * self.dtype.itemsize,
        f"storage {unpickle.shown(self.key)}: got {len(content)} bytes,"
        f" expected {self.numel} numbers of {self.dtype}",
    )
    raw = np.frombuffer(content, np.uint8)
    if big_endian:
      # A complex number is two numbers, each swapped by itself.
      width = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
      raw = raw.view(f"u{width}").byteswap().view(np.uint8)
    # Bytes other than 0 and 1 are no valid NumPy bools.
    is_bool = self.dtype == np.bool_
    self.numbers = raw != 0 if is_bool else raw.view(self.dtype)
    self.numbers.flags.writeable = False


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A view of a storage: offset and strides in elements of `dtype`."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]
  dtype: np.dtype


def as_array(tensor: Tensor, name: str) -> np.ndarray:
  """Returns a tensor's numbers, read-only and not copied.

  Raises:
    UserError: the tensor is not within its storage, or expands few numbers
      to very many.
  """
  size, stride, flat = tensor.size, tensor.stride, tensor.storage.numbers
  count, width = math.prod(size), tensor.dtype.itemsize
  # An empty tensor has no last element.
  last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  end = tensor.offset + (last + 1) * bool(count)
  problem = None
  if flat is None:
    problem = "has a storage without a record"
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
        f"tensor {unpickle.shown(name)} of size {unpickle.shown(size)} and"
        f" stride {unpickle.shown(stride)} {problem}; the file is damaged, or"
        " save a contiguous copy"
    )
  if not count:
    return np.empty(size, tensor.dtype)
  # A step along an axis of length 1 is never taken and may be any number.
  steps = [s * width if n > 1 else 0 for n, s in zip(size, stride, strict=True)]
  raw = flat.view(np.uint8)
  return np.ndarray(size, tensor.dtype, raw, tensor.offset * width, steps)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any):
  """Replaces _rebuild_tensor and _rebuild_tensor_v2."""
  # A storage that is a view of another one is a tensor here.
  is_view = isinstance(storage, Tensor)
  root, start = (storage.storage, storage.offset) if is_view else (storage, 0)
  # rest: requires_grad, hooks, and marks of lazy conjugation or negation.
  unpickle.require(isinstance(root, Storage), "a tensor has no storage")
  unpickle.require(not any(rest[2:3]), "a tensor is conjugated or negated")
  (offset,) = unpickle.counts((offset,), "offset of a tensor")
  size = unpickle.counts(size, "size of a tensor")
  stride = unpickle.counts(stride, "stride of a tensor")
  unpickle.require(len(size) == len(stride), f"a tensor: {size=}, {stride=}")
  return Tensor(root, start + offset, size, stride, root.dtype)


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, *rest):
  """Replaces _rebuild_tensor_v3, for dtypes without a storage of their own."""
  tensor = _tensor(storage, offset, size, stride, grad, hooks, *rest)
  untyped = tensor.dtype == np.uint8 and dtype.value in _UNTYPED
  unpickle.require(untyped, f"a tensor is of {unpickle.shown(dtype)}")
  return dataclasses.replace(tensor, dtype=dtype.value)


def _parameter(data: Any, *_: Any) -> Tensor:
  unpickle.require(isinstance(data, Tensor), "a parameter is no tensor")
  return data


def _with_attributes(function: Any, _: Any, args: Any, *__: Any) -> Tensor:
  """Replaces _rebuild_from_type_v2, without the Python attributes."""
  rebuilds = (_tensor, _tensor_v3, _parameter)
  unpickle.require(function.make in rebuilds, "a tensor is of its own class")
  return function.make(*args)


def _persistent(meta: Any) -> unpickle.Object:
  """Replaces EDM's persistent objects, without their source code."""
  named = type(meta) is dict and type(meta.get("class_name")) is str
  unpickle.require(named, "a persistent object has no class")
  return unpickle.Object(meta["class_name"], meta.get("state"))


def _device(*args: Any) -> str:
  return ":".join(a if type(a) is str else unpickle.shown(a) for a in args)


_GLOBALS = unpickle.GLOBALS | {each.name: each for each in (
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
  """Returns the stand-in for a global that weights need."""
  module, _, name = dotted.rpartition(".")
  if dotted.startswith("torch.nn.modules."):
    return unpickle.Global(
        dotted, lambda: unpickle.Object(name), unpickle.Object
    )
  # Functions that are attributes of networks.
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
      "the pickle refers to something else than a storage",
  )
  new = Storage(unpickle.key(key), kind.value, numel)
  first = storages.setdefault(key, new)
  unpickle.require(
      (first.dtype, first.numel) == (new.dtype, new.numel),
      f"storage {unpickle.shown(key)} is declared twice and differently",
  )
  return first


class _Archive:
  """A zip archive of torch.save and the storages read from it so far."""

  def __init__(self, archive: zipfile.ZipFile, size: int):
    self.archive, self.bytes_left = archive, size
    self.infos = {info.filename: info for info in archive.infolist()}
    self.storages: dict[str, Storage] = {}
    found = [n for n in self.infos if re.fullmatch(r"[^/]*/data\.pkl", n)]
    where = f"the zip archive holds {len(found)} records */data.pkl"
    unpickle.require(len(found) == 1, f"{where}, expected one")
    self.folder = found[0].removesuffix("data.pkl")
    if any(name.startswith(self.folder + "code/") for name in self.infos):
      raise errors.UserError(
          "the file is TorchScript, which is code; save the model's"
          " state_dict() with torch.save instead"
      )
    # Before torch 2.1 this record was not written.
    known = self.folder + "byteorder" in self.infos
    order = self.record("byteorder").strip() if known else b"little"
    known = order in (b"little", b"big")
    unpickle.require(known, f"byteorder is {unpickle.shown(order)}")
    self.big_endian = order == b"big"

  def record(self, name: str) -> bytes:
    """Returns a record's bytes, whose checksum has been verified."""
    info = self.infos.get(self.folder + name)
    where = f"the record {unpickle.shown(name)}"
    unpickle.require(info, f"the file lacks {where}")
    plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    unpickle.require(plain, f"{where} is compressed or encrypted")
    # Records that overlap could need far more memory than the file has bytes.
    self.bytes_left -= info.file_size
    unpickle.require(self.bytes_left >= 0, f"{where} is longer than the file")
    return self.archive.read(info)

  def persistent(self, pid: Any) -> Storage:
    """Returns the storage of a persistent id, after reading its record."""
    storage = _declared(pid, 5, self.storages)
    if storage.numbers is None:
      storage.fill(self.record(f"data/{storage.key}"), self.big_endian)
    return storage


def read_zip(file: BinaryIO) -> Any:
  """Reads a file of torch.save.

  Args:
    file: seekable, a zip archive.

  Returns:
    the saved object: a tree of dicts, lists, `Tensor` (whose storages are
    filled), `unpickle.Object` and plain values.

  Raises:
    UserError: an archive that is damaged, cut short, compressed or not of
      torch.save, or a pickle that is refused.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      found = _Archive(archive, file.seek(0, 2))
      reader = unpickle.Reader(found.record("data.pkl"))
      return unpickle.Unpickler(reader, _lookup, found.persistent).load()
  except (errors.UserError, MemoryError):
    raise
  except Exception as e:  # zipfile has no common ancestor for its errors.
    raise errors.UserError(
        f"the zip archive is damaged or cut short ({unpickle.shown(str(e))});"
        " copy or download it again"
    ) from None


def is_legacy(head: bytes) -> bool:
  """Returns True for the first bytes of a file of torch's legacy format."""
  return head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:40]


def read_legacy(content: bytes) -> Any:
  """Reads a file of torch.save(..., _use_new_zipfile_serialization=False).

  Args:
    content: of the whole file.

  Returns:
    as `read_zip`.

  Raises:
    UserError: as `read_zip`.
  """
  reader = unpickle.Reader(content)
  storages: dict[str, Storage] = {}

  def persistent(pid: Any) -> Any:
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
      return pid[1]  # The class of a whole module, without its source.
    storage = _declared(pid, 6, storages)
    if pid[5] is None:
      return storage
    # A part of another storage, as torch 0.3 and older wrote it.
    _, start, numel = pid[5]
    start, numel = unpickle.counts((start, numel), "view of a storage")
    return Tensor(storage, start, (numel,), (1,), storage.dtype)

  for what, expected in (("magic number", _MAGIC), ("version", _PROTOCOL)):
    found = unpickle.Unpickler(reader, _lookup).load()
    same = type(found) is int and found == expected
    unpickle.require(same, f"{what} is {unpickle.shown(found)}")
  # Sizes of C's types on the machine that wrote the file.
  unpickle.Unpickler(reader, _lookup).load()
  tree = unpickle.Unpickler(reader, _lookup, persistent).load()
  keys = unpickle.Unpickler(reader, _lookup).load()
  for key in keys if type(keys) is list else [None]:
    where = f"storage {unpickle.shown(key)}"
    known = type(key) is str and key in storages
    unpickle.require(known, f"{where} of no tensor")
    storage = storages[key]
    (numel,) = struct.unpack("<q", reader.read(8))
    same = numel == storage.numel and storage.numbers is None
    unpickle.require(same, f"{where} has {numel} numbers, not {storage.numel}")
    # Always little-endian, whatever the machine that wrote them.
    storage.fill(reader.read(numel * storage.dtype.itemsize))
  return tree


def _nested_storage(content: Any) -> Storage:
  """Replaces torch.storage._load_from_bytes."""
  legacy = type(content) is bytes and is_legacy(content[:64])
  storage = read_legacy(content) if legacy else None
  nested = isinstance(storage, Storage)
  unpickle.require(nested, "the pickle nests something else than a storage")
  return storage


def read_pickle(content: bytes) -> Any:
  """Reads a plain pickle, as EDM writes: returns and raises as `read_zip`."""
  # Only here storages are nested, each as a legacy file.
  name = "torch.storage._load_from_bytes"
  nested = {name: unpickle.Global(name, _nested_storage)}
  return unpickle.Unpickler(
      unpickle.Reader(content), lambda name: nested.get(name) or _lookup(name)
  ).load()
