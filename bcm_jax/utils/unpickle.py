"""Restricted unpickler for weight files: nothing is imported or executed.

`Unpickler` is Python's `pickle._Unpickler` with only the opcodes that protocols
2 to 5 write. A global becomes a `Global` of an allow list or an error; only
these are called. Memory and time are bounded by the length of the input:
elements, memo indices and copied bytes are counted, lengths are checked before
allocation, and keys are short text or integers.

The C unpickler cannot be restricted in this way: it allocates its memo by index
and resolves EXT opcodes without `find_class`.
"""

from collections.abc import Callable
import dataclasses
import io
import math
import pickle
import pickletools
import re
import struct
from typing import Any

import numpy as np

from bcm_jax import errors

CUT = "the file ends early or is corrupt; copy or download it again"

# Limits the cost of comparing equal keys and of copying names, characters.
_MAX_TEXT = 4096
_MAX_ELEMENTS = 2_000_000

# Module names of Python 2 in protocol 2.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_NUMBERS = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
  """Stand-in for a global of the allow list.

  Attributes:
    name: dotted name in the pickle.
    make: function that replaces a call of the global; None forbids calls.
    value: value of a global that is not called, for example a dtype.
  """

  name: str
  make: Callable[..., Any] | None = None
  value: Any = None


class Object:
  """Stand-in for an object: class name and attributes."""

  def __init__(self, class_name: str, state: Any = None):
    self.class_name = class_name
    self.build({} if state is None else state)

  def build(self, state: Any) -> None:
    """Sets the attributes; UserError if they are not a dict."""
    where = f"attributes of {shown(self.class_name)}"
    require(type(state) is dict, f"{where}: got {shown(state)}, expected dict")
    self.state = state


class Dtype:
  """Stand-in for a numeric NumPy dtype."""

  def __init__(self, code: Any, *_: Any):
    match = re.fullmatch("[<>|=]?([a-z][0-9]+)", code)
    where = f"dtype of a NumPy array: got {shown(code)}"
    require(match and match[1] in _NUMBERS, f"{where}, expected plain numbers")
    self.value = np.dtype(match[1])

  def build(self, state: Any) -> None:
    """Sets the byte order from the state (version, byte order, ...)."""
    if state[1] == ">":
      self.value = self.value.newbyteorder(">")


class Array:
  """Stand-in for a NumPy array; `build` sets `value`."""

  value: np.ndarray | None = None

  def build(self, state: Any) -> "Array":
    """Sets `value` from (version, shape, dtype, is_fortran, bytes)."""
    _, shape, dtype, fortran, raw = state
    raw = raw.encode("latin-1") if type(raw) is str else raw
    shape = counts(shape, "shape of a NumPy array")
    needed = math.prod(shape) * dtype.value.itemsize
    where = f"NumPy array of shape {shown(shape)}: got {len(raw)} bytes"
    require(needed == len(raw), f"{where}, expected {shown(needed)}")
    flat = np.frombuffer(raw, dtype.value)
    flat = flat.astype(dtype.value.newbyteorder("="), copy=False)
    self.value = flat.reshape(shape, order="F" if fortran else "C")
    return self


class Reader(io.BytesIO):
  """Byte stream whose `read` raises UserError at a premature end."""

  def __init__(self, content: bytes):
    super().__init__(content)
    self.size = len(content)

  def read(self, size: int) -> bytes:
    """Returns exactly `size` bytes."""
    if not 0 <= size <= self.size - self.tell():
      raise errors.UserError(CUT)
    return super().read(size)


def require(condition: Any, problem: str) -> None:
  """Raises UserError with the problem unless the condition holds."""
  if not condition:
    raise errors.UserError(f"{problem}; the file is corrupt or malicious")


def shown(value: Any) -> str:
  """Formats an untrusted value as short text, for errors."""
  if isinstance(value, Global):
    return shown(value.name)
  # The repr of nested lists can be huge; that of a long integer raises.
  is_flat = type(value) is tuple and tuple not in map(type, value)
  if is_flat and len(value) <= 32:
    return f"({', '.join(map(shown, value))})"
  if type(value) not in (str, bytes, int, float, bool, type(None)):
    return f"a {type(value).__name__}"
  if type(value) is int and value.bit_length() > 64:
    return "a huge number"
  text = repr(value[:80] if type(value) in (str, bytes) else value)
  return text if len(text) <= 80 else text[:77] + "..."


def key(value: Any) -> Any:
  """Returns a valid key of a dict or set; UserError for other values."""
  if type(value) is str and len(value) <= _MAX_TEXT:
    return value
  # Longer integers could all have the same hash.
  is_short = type(value) is int and value.bit_length() <= 64
  require(is_short, f"key: got {shown(value)}, expected short text or integer")
  return value


def counts(value: Any, name: str) -> tuple[int, ...]:
  """Returns a valid shape or strides, up to 32 numbers.

  Args:
    value: value in the file.
    name: name of the value, for errors.

  Raises:
    UserError: another type, more numbers, or a negative or huge number.
  """
  if type(value) in (tuple, list) and len(value) <= 32:
    if all(type(n) is int and 0 <= n < 1 << 63 for n in value):
      return tuple(value)
  raise errors.UserError(
      f"{name}: got {shown(value)}, expected up to 32 numbers of at least 0;"
      " the file is corrupt or malicious"
  )


class _Opcodes(dict):
  """Actions by opcode; UserError for other opcodes."""

  def __missing__(self, code: int):
    opcode = pickletools.code2op.get(chr(code))
    raise errors.UserError(
        f"pickle: got opcode {opcode.name if opcode else code}, which could run"
        " code, expected opcodes of weight files in protocols 2 to 5; nothing"
        " was executed; save the weights again with torch.save"
    )


def _standard(names: str, elements: int = 0) -> dict[int, Callable[..., Any]]:
  """Returns the standard library's actions; counts `elements` per call."""

  def counted(action: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: (self.spend(elements), action(self))

  table = pickle._Unpickler.dispatch
  codes = [getattr(pickle, name)[0] for name in names.split()]
  return {c: counted(table[c]) if elements else table[c] for c in codes}


class Unpickler(pickle._Unpickler):
  """Reads one pickle.

  `load` returns dicts (also for their subclasses), lists, tuples, sets, str,
  int, float, bool, bytes, None, `Global`, and results of `Global.make`. It
  raises UserError for globals, opcodes and keys that are not allowed and for
  malformed or truncated pickles.

  Args:
    reader: stream at the first opcode; `load` moves it past the last one.
    lookup: function from a dotted name to its stand-in, or None if it is not
      allowed.
    persistent: function from a persistent id to its object; None forbids
      persistent ids.
  """

  def __init__(
      self,
      reader: Reader,
      lookup: Callable[[str], Global | None],
      persistent: Callable[[Any], Any] | None = None,
  ):
    # A str of Python 2 may be text or bytes; Latin-1 preserves both.
    super().__init__(reader, encoding="latin-1")
    self.size, self.lookup = reader.size, lookup
    if persistent:
      self.persistent_load = persistent
    self.elements_left = min(1024 + 2 * reader.size, _MAX_ELEMENTS)
    self.copies_left = 4096 + 4 * reader.size

  def load(self) -> Any:
    try:
      return super().load()
    except (errors.UserError, MemoryError):
      raise
    # A malformed pickle can raise nearly any exception in the standard opcodes.
    except Exception as e:
      raise errors.UserError(
          f"pickle: got a malformed one ({type(e).__name__}: {shown(str(e))});"
          f" {CUT}"
      ) from None

  def spend(self, elements: int, copies: int = 0) -> None:
    """Counts created elements and copied bytes; UserError above the limits."""
    self.elements_left -= elements
    self.copies_left -= copies
    if min(self.elements_left, self.copies_left) < 0:
      raise errors.UserError(
          f"pickle: got too many objects or copies for {self.size} bytes; the"
          " file is corrupt or malicious"
      )

  def charge(self, values: Any) -> None:
    """Counts the objects that a call may create from large or shared values."""
    values = values if type(values) is tuple else (values,)
    self.spend(4 + len(values))
    for value in values:
      if type(value) in (str, bytes):
        self.spend(0, len(value))
      elif type(value) in (list, tuple, dict, set):
        self.spend(len(value))

  def find_class(self, module: str, name: str) -> Global:
    dotted = f"{_RENAMED.get(module, module)}.{name}"
    self.charge(dotted)
    allowed = name.isidentifier() and len(dotted) <= _MAX_TEXT
    stand_in = self.lookup(dotted) if allowed else None
    if stand_in is None:
      raise errors.UserError(
          f"pickle: got {shown(dotted)}, which could run code, expected names"
          " of weight files; nothing was executed; ask its author for a plain"
          " state dict or .safetensors"
      )
    return stand_in

  def call(self) -> None:
    """Action of REDUCE and NEWOBJ: calls a `Global` of the allow list."""
    args, function = self.stack.pop(), self.stack.pop()
    is_call = isinstance(function, Global) and type(args) is tuple
    allowed = is_call and function.make is not None
    require(
        allowed,
        f"pickle: got a call of {shown(function)}, expected only those of"
        " weight files",
    )
    self.charge(args)
    self.append(function.make(*args))

  def build(self) -> None:
    """Action of BUILD: sets the state of a stand-in."""
    state, target = self.stack.pop(), self.stack[-1]
    self.charge(state)
    if isinstance(target, (Object, Dtype, Array)):
      target.build(state)
    else:  # Attributes of a dict, such as _metadata, are not weights.
      allowed = type(target) is dict and type(state) in (dict, type(None))
      require(
          allowed, f"pickle: got a state of {shown(target)}, expected an object"
      )

  def add(self, kind: type, items: list[Any]) -> None:
    """Adds items to the list, dict or set on top of the stack."""
    target = self.stack[-1]
    require(
        type(target) is kind,
        f"pickle: got items of {shown(target)}, expected a {kind.__name__}",
    )
    if kind is list:
      target.extend(items)
    elif kind is set:
      target.update(map(key, items))
    else:
      target.update(zip(map(key, items[::2]), items[1::2], strict=True))

  def frozen(self) -> None:
    """Action of FROZENSET."""
    self.spend(4)
    items = self.pop_mark()
    self.append(_set(items))

  def remember(self, index: int) -> None:
    """Stores the top of the stack in the memo."""
    require(
        index < self.size,
        f"memo index: got {index}, expected less than {self.size}",
    )
    self.spend(1)
    self.memo[index] = self.stack[-1]

  # A set needs as much memory as four lists.
  dispatch = _Opcodes(
      _standard(
          "PROTO FRAME STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT"
          " BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE"
          " BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES"
          " BINBYTES8 EMPTY_TUPLE GLOBAL STACK_GLOBAL BINPERSID BINGET"
          " LONG_BINGET"
      )
      | _standard("MARK EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3", 1)
      | _standard("EMPTY_SET", 4)
      | {code[0]: action for code, action in {
          pickle.REDUCE: call,
          pickle.NEWOBJ: call,
          pickle.BUILD: build,
          pickle.APPEND: lambda s: s.add(list, [s.stack.pop()]),
          pickle.APPENDS: lambda s: s.add(list, s.pop_mark()),
          pickle.SETITEM: lambda s: s.add(
              dict, [s.stack.pop(), s.stack.pop()][::-1]
          ),
          pickle.SETITEMS: lambda s: s.add(dict, s.pop_mark()),
          pickle.ADDITEMS: lambda s: s.add(set, s.pop_mark()),
          pickle.FROZENSET: frozen,
          # The library's action of BYTEARRAY8 allocates before it reads.
          pickle.BYTEARRAY8: pickle._Unpickler.load_binbytes8,
          pickle.BINPUT: lambda s: s.remember(s.read(1)[0]),
          pickle.LONG_BINPUT: lambda s: s.remember(
              struct.unpack("<I", s.read(4))[0]
          ),
          pickle.MEMOIZE: lambda s: s.remember(len(s.memo)),
      }.items()}
  )


def make_dict(items: Any = ()) -> dict[Any, Any]:
  """Returns the dict of (key, value) pairs; UserError for unsuitable keys."""
  return {key(name): value for name, value in items}


def _set(items: Any = ()) -> set[Any]:
  """Returns a set of valid keys."""
  return set(map(key, items))


def _bytes(content: Any = b"", encoding: Any = None) -> bytes:
  """Returns bytes; protocol 2 writes them as Latin-1 text."""
  if type(content) is str and encoding in ("latin1", "latin-1"):
    return content.encode("latin-1")
  require(
      type(content) is bytes and not encoding,
      f"bytes: got {shown(content)} in encoding {shown(encoding)}, expected"
      " latin1",
  )
  return content


def _instance(cls: Any, *_: Any) -> Any:
  """Replaces copyreg._reconstructor; BUILD sets the state."""
  require(
      cls.value is Object, f"object: got {shown(cls)}, expected a module"
  )
  return cls.make()


# Allowed globals of Python and NumPy, by dotted name.
GLOBALS = {entry.name: entry for entry in (
    Global("collections.OrderedDict", make_dict),
    Global("collections.defaultdict", lambda _=None: {}),
    Global("argparse.Namespace", lambda: Object("Namespace"), Object),
    Global("copyreg._reconstructor", _instance),
    Global("_codecs.encode", _bytes),
    *(Global(f"builtins.{name}", _bytes) for name in ("bytes", "bytearray")),
    *(Global(f"builtins.{name}", _set) for name in ("set", "frozenset")),
    *(Global(f"builtins.{name}")
      for name in "object int long float list dict str bool tuple".split()),
    Global("numpy.dtype", Dtype),
    Global("numpy.ndarray"),
    *(Global(f"numpy.{core}.{name}", make)
      for core in ("core", "_core")
      for name, make in (
          ("multiarray._reconstruct", lambda *_: Array()),
          ("multiarray.scalar",
           lambda dtype, raw: Array().build((1, (1,), dtype, 0, raw)).value[0]),
          ("numeric._frombuffer",
           lambda raw, dtype, shape, order: Array().build(
               (1, shape, dtype, order == "F", raw)
           )),
      )),
)}
