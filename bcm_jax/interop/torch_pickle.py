"""What PyTorch pickles name, each as something inert.

The formats are those of torch 2 (`torch._utils`, `torch.serialization`) and
of `torch_utils.persistence` of EDM (Karras et al., 2022), version 6.
"""

from collections.abc import Callable
import dataclasses
import math
import re
from typing import Any

import ml_dtypes
import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import numpy_pickle
from bcm_jax.interop.pickle_machine import Known
from bcm_jax.interop.pickle_machine import pairs
from bcm_jax.interop.pickle_machine import shown
from bcm_jax.interop.pickle_machine import Stub

# Storages by their names in torch; each stands for its dtype.
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}

# Dtypes that came without a storage of their own (torch 2.1 and later).
_UNTYPED = (
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz"),
)

# An expanded tensor repeats few numbers; more than this many is no weight.
_MAX_EXPANDED = 1 << 20


@dataclasses.dataclass(eq=False)
class Storage:
  """Numbers in a row, on which tensors are views.

  Attributes:
    key: its name in the file.
    dtype: of the numbers; uint8 if untyped.
    numel: how many, as declared by the pickle.
    numbers: [numel], None until the file's record was read.
    root: for a view of the oldest format, the storage that it is a part of.
    start: where in `root` it starts, in elements.
  """

  key: str
  dtype: np.dtype
  numel: int
  numbers: np.ndarray | None = None
  root: "Storage | None" = None
  start: int = 0

  def fill(self, content: bytes, big_endian: bool = False) -> None:
    """Takes the record's bytes; UserError if they are not `numel` numbers."""
    if len(content) != self.numel * self.dtype.itemsize:
      raise UserError(
          f"storage {shown(self.key)} has {len(content)} bytes, but the pickle"
          f" declares {shown(self.numel)} numbers of {self.dtype}; the file is"
          " damaged, copy or download it again"
      )
    raw = np.frombuffer(content, np.uint8)
    if raw.ctypes.data % 16:  # Records of old files lie anywhere.
      raw = raw.copy()
    if big_endian:
      # A complex number is two, each swapped by itself.
      width = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
      raw = raw.reshape(-1, width)[:, ::-1].reshape(-1)
    self.numbers = _typed(raw, self.dtype)
    self.numbers.flags.writeable = False

  def flat(self) -> np.ndarray:
    """Returns the numbers [numel]; UserError if the file has none."""
    if self.root is not None:
      whole = self.root.flat()
      if self.start + self.numel > len(whole):
        raise UserError(f"storage {shown(self.key)} ends behind its root")
      return whole[self.start : self.start + self.numel]
    if self.numbers is None:
      raise UserError(f"the file holds no record of storage {shown(self.key)}")
    return self.numbers


def _typed(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
  # Bytes other than 0 and 1 are no valid NumPy bools.
  return raw != 0 if dtype == np.bool_ else raw.view(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A view on a storage: offset and strides in elements of `dtype`."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]
  dtype: np.dtype


def as_array(tensor: Tensor, name: str) -> np.ndarray:
  """Returns a tensor's numbers, without copying them.

  Args:
    tensor: of a file whose records were read.
    name: of the tensor, for errors.

  Returns:
    read-only, of the tensor's dtype and size, with the storage's strides.

  Raises:
    UserError: the tensor is not within its storage, or is a few numbers
      expanded beyond any use.
  """
  flat = tensor.storage.flat()
  dtype = tensor.dtype
  if dtype != flat.dtype:
    if flat.dtype != np.uint8 or len(flat) % dtype.itemsize:
      raise UserError(
          f"tensor {shown(name)} of {dtype} lies in a storage of {flat.dtype}"
      )
    flat = _typed(flat, dtype)
  count = math.prod(tensor.size)
  spans = zip(tensor.size, tensor.stride, strict=True)
  # An empty tensor touches nothing.
  end = tensor.offset + (sum((n - 1) * s for n, s in spans) + 1) * bool(count)
  if end > len(flat):
    raise UserError(
        f"tensor {shown(name)} of size {shown(tensor.size)} and stride"
        f" {shown(tensor.stride)} reaches element {shown(end)} of a storage of"
        f" {len(flat)}; the file is damaged or hostile and is refused"
    )
  bulk = math.prod(n for n in tensor.size if n)
  if count > max(len(flat), _MAX_EXPANDED) or bulk >> 56:
    raise UserError(
        f"tensor {shown(name)} of size {shown(tensor.size)} expands"
        f" {len(flat)} stored numbers; save a contiguous copy instead"
    )
  if not count:
    return np.empty(tensor.size, dtype)
  # A step along an axis of length 1 is never taken and may be any number.
  steps = [
      s * dtype.itemsize if n > 1 else 0
      for n, s in zip(tensor.size, tensor.stride, strict=True)
  ]
  raw = flat.view(np.uint8)
  at = tensor.offset * dtype.itemsize
  return np.ndarray(tensor.size, dtype, raw, at, steps)


class Module(Stub):
  """A module, or any object kept by EDM's persistence: a name and a state.

  Attributes:
    class_name: without its module.
    state: the object's attributes; its code is dropped.
  """

  def __init__(self, class_name: str, state: dict[str, Any] | None = None):
    self.class_name = class_name
    self.state = {} if state is None else state

  def build(self, state: Any) -> None:
    """Takes the attributes."""
    if type(state) is not dict:
      raise UserError(
          f"the pickle gives {shown(self.class_name)} attributes in a"
          f" {type(state).__name__}, expected a dict"
      )
    self.state = state

  def part(self, name: str) -> dict[str, Any]:
    """Returns '_parameters', '_buffers' or '_modules', {} if there is none."""
    part = self.state.get(name) or {}
    if type(part) is not dict:
      raise UserError(
          f"{name} of {shown(self.class_name)} is a {type(part).__name__},"
          " expected a dict"
      )
    return part


def _counts(value: Any, what: str) -> tuple[int, ...]:
  if type(value) in (tuple, list) and len(value) <= 32:
    if all(type(n) is int and 0 <= n < 1 << 63 for n in value):
      return tuple(value)
  raise UserError(
      f"the pickle holds a tensor of {what} {shown(value)}, expected up to 32"
      " numbers of at least 0; the file is damaged"
  )


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any):
  """Makes what _rebuild_tensor and _rebuild_tensor_v2 make."""
  # rest: requires_grad, hooks, and marks of lazy conjugation or negation.
  if len(rest) > 2 and rest[2]:
    raise UserError("the pickle holds a tensor that is conjugated or negated")
  if not isinstance(storage, Storage):
    raise UserError("the pickle holds a tensor without a storage")
  (offset,) = _counts((offset,), "offset")
  size, stride = _counts(size, "size"), _counts(stride, "stride")
  if len(size) != len(stride):
    raise UserError(f"the pickle holds a size {size} with strides {stride}")
  return Tensor(storage, offset, size, stride, storage.dtype)


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, *metadata):
  """Makes a tensor whose dtype is not its storage's."""
  made = _tensor(storage, offset, size, stride, grad, hooks, *metadata)
  if not isinstance(dtype, Known) or not isinstance(dtype.value, np.dtype):
    raise UserError("the pickle holds a tensor without a dtype")
  return dataclasses.replace(made, dtype=dtype.value)


def _parameter(data: Any, *_: Any) -> Tensor:
  if not isinstance(data, Tensor):
    raise UserError("the pickle holds a parameter that is no tensor")
  return data


def _with_attributes(function: Any, _: Any, args: Any, *__: Any) -> Tensor:
  """Makes a tensor that had Python attributes, without them."""
  rebuilds = (_tensor, _tensor_v3, _parameter)
  if not isinstance(function, Known) or function.make not in rebuilds:
    raise UserError("the pickle holds a tensor of a class of its own; refused")
  if type(args) is not tuple:
    raise UserError("the pickle holds a tensor without arguments")
  return function.make(*args)


def _persistent(meta: Any) -> Module:
  """Makes the object without its source code."""
  if type(meta) is not dict or type(meta.get("class_name")) is not str:
    raise UserError("the pickle holds a persistent object without its class")
  made = Module(meta["class_name"])
  if meta.get("state") is not None:
    made.build(meta["state"])
  return made


def _reconstructed(known: Any, *_: Any) -> Any:
  # What object.__reduce__ gives at any protocol; its state comes with BUILD.
  if not isinstance(known, Known) or known.value is not Module:
    raise UserError("the pickle makes an object that is no module; refused")
  return known.make()


def _raw(content: Any = b"", encoding: Any = None) -> bytes:
  if encoding is not None:
    return numpy_pickle.encode(content, encoding)
  if type(content) is not bytes:
    raise UserError("the pickle makes bytes of something else; refused")
  return content


def _set(items: Any = ()) -> set:
  if type(items) not in (list, tuple):
    raise UserError("the pickle makes a set of something else; refused")
  return set(pairs((item, None) for item in items))


def _device(kind: Any = "cpu", index: Any = None) -> str:
  name = kind if type(kind) is str else shown(kind)
  return name if index is None else f"{name}:{shown(index)}"


def _known() -> dict[str, Known]:
  found = [
      Known("collections.OrderedDict", lambda items=(): pairs(items)),
      Known("collections.defaultdict", lambda _=None: {}),
      Known("dnnlib.util.EasyDict", lambda items=(): pairs(items)),
      Known("dnnlib.EasyDict", lambda items=(): pairs(items)),
      Known("argparse.Namespace", lambda: Module("Namespace")),
      Known("builtins.set", _set),
      Known("builtins.frozenset", _set),
      Known("builtins.bytes", _raw),
      Known("builtins.bytearray", _raw),
      *(Known(f"builtins.{n}") for n in ("object", "int", "float", "list")),
      *(Known(f"builtins.{n}") for n in ("dict", "str", "bool", "tuple")),
      Known("copyreg._reconstructor", _reconstructed),
      Known("torch._utils._rebuild_tensor", _tensor),
      Known("torch._utils._rebuild_tensor_v2", _tensor),
      Known("torch._utils._rebuild_tensor_v3", _tensor_v3),
      Known("torch._utils._rebuild_parameter", _parameter),
      Known("torch._utils._rebuild_parameter_with_state", _parameter),
      Known("torch._tensor._rebuild_from_type_v2", _with_attributes),
      Known("torch.Tensor"),
      Known("torch.nn.parameter.Parameter", _parameter),
      Known("torch.nn.parameter.Buffer"),
      Known("torch.Size", lambda size=(): _counts(size, "size")),
      Known("torch.device", _device),
      Known("torch_utils.persistence._reconstruct_persistent_obj", _persistent),
  ]
  for name, dtype in STORAGES.items():
    found += [Known(f"{at}.{name}", None, dtype) for at in _STORAGE_MODULES]
    found.append(Known(f"torch.{dtype.name}", None, dtype))
  found += [Known(f"torch.{n}", None, np.dtype(n)) for n in _UNTYPED]
  byte = np.dtype(np.uint8)
  for at in ("torch", "torch.storage"):
    found.append(Known(f"{at}.UntypedStorage", None, byte))
  return {each.name: each for each in found} | numpy_pickle.known()


_STORAGE_MODULES = ("torch", "torch.cuda")
_KNOWN = _known()
# Python 2 names, which protocol 2 still writes.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Classes and functions that are attributes of networks.
_MODULES = "torch.nn.modules."
_FUNCTIONS = ("torch.nn.functional", "torch._C._nn")


def lookup(
    load_from_bytes: Callable[[bytes], Storage] | None = None,
) -> Callable[[str, str], Known | None]:
  """Returns the look-up of all names that weights need.

  Args:
    load_from_bytes: reads the storages that a plain pickle nests; None where
      there may be none.
  """

  def look_up(module: str, name: str) -> Known | None:
    module = _RENAMED.get(module, module)
    dotted = f"{module}.{name}"
    if dotted == "torch.storage._load_from_bytes" and load_from_bytes:
      return Known(dotted, load_from_bytes)
    if dotted in _KNOWN and "." not in name:
      return _KNOWN[dotted]
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
      return None
    if module.startswith(_MODULES):
      return Known(dotted, lambda: Module(name), Module)
    if module in _FUNCTIONS:
      return Known(dotted)
    return None

  return look_up
