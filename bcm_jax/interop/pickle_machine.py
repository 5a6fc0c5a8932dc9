"""A pickle read as data, by a stack machine that can call nothing of its own.

Python's unpickler imports what a file names and calls it, and some of its
opcodes go round `find_class` (the copyreg registry) or allocate what a few
bytes ask for (memo indices, byte arrays). This machine interprets the opcodes
of protocols 2 to 5 itself: a name becomes a `Known` or an error, nothing is
ever imported, and what is made is bounded by the length of the file.
"""

import abc
from collections.abc import Callable
import dataclasses
import operator
import pickle
from typing import Any

from bcm_jax.errors import UserError
from bcm_jax.interop.cursor import Cursor
from bcm_jax.interop.cursor import CUT

# What may be a key of a dict or a member of a set: hashing a deeply nested
# tuple would exhaust the interpreter's stack.
_HASHABLE = (str, int, float, bool, bytes, type(None))

# Objects that calls may copy, for each byte of the pickle. An honest pickle
# names each object in about one call; a hostile one repeats a large object.
_COPIES_PER_BYTE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """A global that a reader knows, in place of what the pickle names.

  Attributes:
    name: dotted, as in the pickle.
    make: what a call of it gives, from the pickle's arguments; None if the
      global may be named and not called.
    value: what it stands for where it is only named, for example a dtype.
  """

  name: str
  make: Callable[..., Any] | None = None
  value: Any = None


class Stub(abc.ABC):
  """An object of ours that takes a pickled state."""

  @abc.abstractmethod
  def build(self, state: Any) -> None:
    """Takes the state; raises UserError if it is not what is expected."""


def shown(value: Any) -> str:
  """Returns a short repr for an error message, of a file's own choosing."""
  # The repr of nested lists may recurse without end, that of a long integer
  # raises.
  if type(value) is tuple and len(value) <= 32:
    return f"({', '.join(map(shown, value))})" if _flat(value) else "a tuple"
  if type(value) not in _HASHABLE:
    return f"a {type(value).__name__}"
  if type(value) is int and value.bit_length() > 64:
    return "a huge number"
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def refuse_global(name: str) -> UserError:
  """Error for a name that is not on the list."""
  return UserError(
      f"the pickle names {shown(name)}, which weights do not need and which"
      " could run code; the file is refused and nothing of it was run; ask its"
      " author for a plain state dict or .safetensors"
  )


def load(
    cursor: Cursor,
    lookup: Callable[[str, str], Known | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
  """Returns the object of the pickle at the cursor, and moves past it.

  Args:
    cursor: at the first opcode.
    lookup: from (module, name) to what stands for it, None to refuse it.
    persistent: from a persistent id to its object; None refuses them.

  Returns:
    dicts (also for their subclasses), lists, tuples, sets, str, int, float,
    bool, bytes, None, `Known`, and what their `make` gave.

  Raises:
    UserError: a name that is refused, an opcode that weight files do not use,
      a malformed or truncated pickle.
  """
  return _Machine(cursor, lookup, persistent).run()


class _Machine:
  """The stack, the marks and the memo of one pickle."""

  def __init__(self, cursor, lookup, persistent):
    self.cursor = cursor
    self.lookup = lookup
    self.persistent = persistent
    self.stack: list[Any] = []
    self.marked: list[list[Any]] = []
    self.memo: dict[int, Any] = {}
    self.copies_left = 4096 + _COPIES_PER_BYTE * len(cursor)

  def run(self) -> Any:
    while (code := self.cursor.byte()) != pickle.STOP[0]:
      action = _BY_CODE.get(code)
      if action is None:
        raise UserError(
            f"the pickle uses opcode {bytes([code])!r}, which weight files of"
            " protocols 2 to 5 do not; the file is refused; save the weights"
            " again with torch.save"
        )
      action(self)
    return self.pop()

  def pop(self) -> Any:
    self.need(1)
    return self.stack.pop()

  def need(self, count: int) -> None:
    if len(self.stack) < count:
      raise UserError(f"the pickle is malformed (its stack is empty): {CUT}")

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def mark(self) -> None:
    self.marked.append(self.stack)
    self.stack = []

  def pop_mark(self) -> list[Any]:
    if not self.marked:
      raise UserError(f"the pickle is malformed (a mark is missing): {CUT}")
    items, self.stack = self.stack, self.marked.pop()
    return items

  def tuple_of(self, count: int) -> None:
    self.need(count)
    items = tuple(self.stack[-count:])
    self.stack[-count:] = [items]

  def top(self, *kinds: type) -> Any:
    """Returns the object that items are added to, which must be ours."""
    self.need(1)
    if type(self.stack[-1]) not in kinds:
      raise UserError(
          f"the pickle adds items to {_kind(self.stack[-1])}, expected"
          f" {kinds[0].__name__}; the file is refused"
      )
    return self.stack[-1]

  def append(self, items: list[Any]) -> None:
    self.top(list).extend(items)

  def set_items(self, items: list[Any]) -> None:
    if len(items) % 2:
      raise UserError(f"the pickle is malformed (a key alone): {CUT}")
    self.top(dict).update(pairs(zip(items[::2], items[1::2], strict=True)))

  def add_items(self, items: list[Any]) -> None:
    self.top(set).update(hashable(item) for item in items)

  def long(self, form: str) -> None:
    count = self.cursor.unpack(form)
    # Longer ones are slow to multiply and to print, and no weight needs them.
    if count > 1024:
      raise UserError(f"the pickle holds an integer of {count} bytes; refused")
    self.push(int.from_bytes(self.cursor.take(count), "little", signed=True))

  def text(self, form: str, encoding: str = "utf-8") -> None:
    content = bytes(self.cursor.take(self.cursor.unpack(form)))
    try:
      self.push(content.decode(encoding, "surrogatepass"))
    except UnicodeDecodeError:
      raise UserError(f"the pickle holds text that is not {encoding}") from None

  def old_text(self, form: str) -> None:
    # A str of Python 2 may be text or bytes; Latin-1 keeps either.
    content = self.cursor.take(self.cursor.unpack(form))
    self.push(bytes(content).decode("latin-1"))

  def raw(self, form: str) -> None:
    self.push(bytes(self.cursor.take(self.cursor.unpack(form))))

  def name(self, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
      raise UserError("the pickle names a global by something else than text")
    known = self.lookup(module, name)
    if known is None:
      raise refuse_global(f"{module}.{name}")
    self.push(known)

  def global_(self) -> None:
    self.name(self.cursor.line(), self.cursor.line())

  def stack_global(self) -> None:
    name, module = self.pop(), self.pop()
    self.name(module, name)

  def inst(self) -> None:
    self.global_()  # Refuses a foreign name by that name.
    raise UserError("the pickle uses opcode INST, which is refused")

  def extension(self, form: str) -> None:
    raise UserError(
        f"the pickle names extension {self.cursor.unpack(form)} of the copyreg"
        " registry, which could run code; the file is refused and nothing of"
        " it was run"
    )

  def call(self) -> None:
    args, known = self.pop(), self.pop()
    if not isinstance(known, Known) or known.make is None:
      raise UserError(
          f"the pickle calls {_kind(known)}, which is not to be called; the"
          " file is refused and nothing of it was run"
      )
    if type(args) is not tuple:
      raise UserError(f"the pickle calls {known.name} without arguments")
    self.charge(args)
    try:
      self.push(known.make(*args))
    except UserError:
      raise
    except (TypeError, ValueError) as e:
      raise UserError(
          f"the pickle calls {known.name} with wrong arguments ({e}): {CUT}"
      ) from None

  def call_with_names(self) -> None:
    if self.pop() != {}:
      raise UserError("the pickle calls with keywords, which is refused")
    self.call()

  def build(self) -> None:
    state = self.pop()
    self.need(1)
    target = self.stack[-1]
    if isinstance(target, Stub):
      self.charge(state if type(state) is tuple else ())
      target.build(state)
    # Attributes of a dict, such as a state dict's _metadata, are of no use.
    elif type(target) is not dict or type(state) not in (dict, type(None)):
      raise UserError(
          f"the pickle sets the state of {_kind(target)}, which has none; the"
          " file is refused and nothing of it was run"
      )

  def charge(self, items: tuple[Any, ...]) -> None:
    """Bounds what is made from objects that the pickle names repeatedly."""
    for item in items:
      if type(item) in (str, bytes, list, tuple, dict, set):
        self.copies_left -= len(item)
    if self.copies_left < 0:
      raise UserError(
          "the pickle copies its content again and again; it would fill the"
          " memory and is refused"
      )

  def persist(self) -> None:
    if self.persistent is None:
      raise UserError("the pickle refers to storages that the file lacks")
    self.push(self.persistent(self.pop()))

  def remember(self, index: int) -> None:
    self.need(1)
    self.memo[index] = self.stack[-1]

  def recall(self, index: int) -> None:
    if index not in self.memo:
      raise UserError(f"the pickle is malformed (memo {index}): {CUT}")
    self.push(self.memo[index])

  def duplicate(self) -> None:
    self.need(1)
    self.push(self.stack[-1])


def _kind(value: Any) -> str:
  if isinstance(value, Known):
    return shown(value.name)
  return f"a {type(value).__name__}"


def _flat(values: tuple[Any, ...]) -> bool:
  return all(type(value) in _HASHABLE for value in values)


def hashable(value: Any) -> Any:
  """Returns the value if it is plain enough to be a key, else UserError."""
  if _flat(value if type(value) is tuple else (value,)):
    return value
  raise UserError(
      f"the pickle uses {_kind(value)} as a key, expected text or a number; the"
      " file is refused"
  )


def pairs(items: Any) -> dict[Any, Any]:
  """Returns the dict of (key, value) pairs; UserError for a key too deep."""
  return {hashable(key): value for key, value in items}


def _pushes(value: Any) -> Callable[[_Machine], None]:
  return lambda m: m.push(value)


def _reads(form: str) -> Callable[[_Machine], None]:
  return lambda m: m.push(m.cursor.unpack(form))


_method = operator.methodcaller

_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: lambda m: m.cursor.take(1),
    pickle.FRAME: lambda m: m.cursor.take(8),
    pickle.NONE: _pushes(None),
    pickle.NEWTRUE: _pushes(True),
    pickle.NEWFALSE: _pushes(False),
    pickle.EMPTY_TUPLE: _pushes(()),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_SET: lambda m: m.push(set()),
    pickle.BININT: _reads("<i"),
    pickle.BININT1: _reads("<B"),
    pickle.BININT2: _reads("<H"),
    pickle.BINFLOAT: _reads(">d"),
    pickle.LONG1: _method("long", "<B"),
    pickle.LONG4: _method("long", "<I"),
    pickle.SHORT_BINUNICODE: _method("text", "<B"),
    pickle.BINUNICODE: _method("text", "<I"),
    pickle.BINUNICODE8: _method("text", "<Q"),
    pickle.SHORT_BINSTRING: _method("old_text", "<B"),
    pickle.BINSTRING: _method("old_text", "<I"),
    pickle.SHORT_BINBYTES: _method("raw", "<B"),
    pickle.BINBYTES: _method("raw", "<I"),
    pickle.BINBYTES8: _method("raw", "<Q"),
    pickle.BYTEARRAY8: _method("raw", "<Q"),
    pickle.MARK: _method("mark"),
    pickle.POP_MARK: _method("pop_mark"),
    pickle.POP: _method("pop"),
    pickle.DUP: _method("duplicate"),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.TUPLE1: _method("tuple_of", 1),
    pickle.TUPLE2: _method("tuple_of", 2),
    pickle.TUPLE3: _method("tuple_of", 3),
    pickle.APPEND: lambda m: m.append([m.pop()]),
    pickle.APPENDS: lambda m: m.append(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.ADDITEMS: lambda m: m.add_items(m.pop_mark()),
    pickle.FROZENSET: lambda m: m.push(frozenset(map(hashable, m.pop_mark()))),
    pickle.GLOBAL: _method("global_"),
    pickle.STACK_GLOBAL: _method("stack_global"),
    pickle.INST: _method("inst"),
    pickle.EXT1: _method("extension", "<B"),
    pickle.EXT2: _method("extension", "<H"),
    pickle.EXT4: _method("extension", "<i"),
    pickle.REDUCE: _method("call"),
    pickle.NEWOBJ: _method("call"),
    pickle.NEWOBJ_EX: _method("call_with_names"),
    pickle.BUILD: _method("build"),
    pickle.BINPERSID: _method("persist"),
    pickle.BINPUT: lambda m: m.remember(m.cursor.unpack("<B")),
    pickle.LONG_BINPUT: lambda m: m.remember(m.cursor.unpack("<I")),
    pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
    pickle.BINGET: lambda m: m.recall(m.cursor.unpack("<B")),
    pickle.LONG_BINGET: lambda m: m.recall(m.cursor.unpack("<I")),
}

_BY_CODE = {code[0]: action for code, action in _ACTIONS.items()}
