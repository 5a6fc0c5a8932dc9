"""Pickles that would run code are refused by name, and nothing runs."""

import copyreg
import functools
import os
import pathlib
import pickle

import pytest

from bcm_jax.errors import UserError
from bcm_jax.interop import weight_files
from bcm_jax.utils import unpickle
from tests.interop import craft
from tests.interop.craft import call
from tests.interop.craft import name
from tests.interop.craft import text

TRACE = "hostile_code_ran"
COMMAND = text(f"touch {TRACE}")
SOURCE = text(f"open({TRACE!r}, 'w')")


def _stacked(module: str, attribute: str) -> bytes:
  return text(module) + text(attribute) + b"\x93"


# A body of opcodes, and the name that the error must contain.
HOSTILE = {
    "system": (call(name("os", "system"), COMMAND), "os.system"),
    "eval": (call(name("builtins", "eval"), SOURCE), "builtins.eval"),
    "python_2": (call(name("__builtin__", "eval"), SOURCE), "builtins.eval"),
    "stack_global": (call(_stacked("os", "system"), COMMAND), "os.system"),
    "torch": (call(name("torch", "load"), COMMAND), "torch.load"),
    "edm": (
        call(name("torch_utils.persistence", "_src_to_module"), SOURCE),
        "torch_utils.persistence._src_to_module",
    ),
    "numpy": (
        call(name("numpy.testing._private.utils", "runstring"), SOURCE, b"}"),
        "numpy.testing._private.utils.runstring",
    ),
    "new_object": (
        name("subprocess", "Popen") + craft.tuple_of(COMMAND) + b"\x81",
        "subprocess.Popen",
    ),
    "inst": (b"(" + COMMAND + b"ios\nsystem\n", "opcode INST"),
    "obj": (b"(" + name("collections", "OrderedDict") + b"o", "opcode OBJ"),
    "never_called": (name("os", "system"), "os.system"),
    "dotted": (
        _stacked("collections", "OrderedDict.__init__.__globals__"),
        "collections.OrderedDict.__init__.__globals__",
    ),
    "dotted_into_a_known_one": (
        name("torch", "_utils._rebuild_tensor_v2"),
        "torch._utils._rebuild_tensor_v2",
    ),
    "dotted_layer": (
        name("torch.nn.modules.module", "Module.__init__.__globals__"),
        "torch.nn.modules.module.Module.__init__.__globals__",
    ),
}


def _zip(path: pathlib.Path, body: bytes) -> None:
  craft.write_zip(path, body, {})


def _legacy(path: pathlib.Path, body: bytes) -> None:
  path.write_bytes(craft.legacy(body))


def _magic(path: pathlib.Path, body: bytes) -> None:
  # In place of the system information, before the object itself.
  parts = [craft.MAGIC, craft.VERSION, craft.pickled(body)]
  path.write_bytes(b"".join(parts))


def _plain(path: pathlib.Path, body: bytes) -> None:
  path.write_bytes(craft.pickled(craft.dict_of(ema=body)))


def _nested(path: pathlib.Path, body: bytes) -> None:
  path.write_bytes(craft.edm(craft.nested(craft.legacy(body))))


CONTAINERS = [_zip, _legacy, _magic, _plain, _nested]


def refusal(path: pathlib.Path, tmp_path, monkeypatch) -> str:
  """Returns the error of reading a file, after looking for side effects."""
  monkeypatch.chdir(tmp_path)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError) as error:
    weight_files.read(str(path))
  assert sorted(tmp_path.iterdir()) == before
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
    "case, container",
    [(case, _zip) for case in HOSTILE]
    + [("system", container) for container in CONTAINERS[1:]],
)
def test_code_is_refused_by_name(case, container, tmp_path, monkeypatch):
  body, named = HOSTILE[case]
  path = tmp_path / "hostile.pt"
  container(path, body)
  message = refusal(path, tmp_path, monkeypatch)
  assert named in message
  assert "could run code" in message and "nothing was executed" in message


class _Hostile:

  def __reduce__(self):
    return os.system, (f"touch {TRACE}",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_itself_would_run(protocol, tmp_path, monkeypatch):
  path = tmp_path / "hostile.pkl"
  path.write_bytes(pickle.dumps(dict(ema=_Hostile()), protocol))
  assert "posix.system" in refusal(path, tmp_path, monkeypatch)
  # The control: the same bytes do run in Python's unpickler.
  pickle.loads(path.read_bytes())
  assert (tmp_path / TRACE).exists()


def test_the_table_of_the_standard_library_stays_as_it_is():
  standard = pickle._Unpickler.dispatch
  assert unpickle.Unpickler.dispatch is not standard
  assert pickle.INST[0] in standard and pickle.EXT1[0] in standard
  assert standard[pickle.REDUCE[0]] is pickle._Unpickler.load_reduce


def test_extensions_are_refused_even_when_registered(tmp_path, monkeypatch):
  # The unpickler looks into this cache before it asks find_class.
  monkeypatch.setitem(copyreg._extension_cache, 200, os.system)
  body = call(b"\x82\xc8", COMMAND)
  monkeypatch.chdir(tmp_path)
  pickle.loads(craft.pickled(body))
  (tmp_path / TRACE).unlink()
  for n, opcode in ((1, b"\x82"), (2, b"\x83"), (4, b"\x84")):
    path = tmp_path / "hostile.pt"
    _zip(path, call(opcode + (200).to_bytes(n, "little"), COMMAND))
    assert f"opcode EXT{n}" in refusal(path, tmp_path, monkeypatch)


_LAYER = name("torch.nn.modules.linear", "Linear") + b")\x81"
_STATE = craft.dict_of(
    __setstate__=name("torch", "float32"),
    __class__=name("torch", "float32"),
    build=text("x"),
    state=text("x"),
    part=text("x"),
    _parameters=craft.dict_of(w=craft.tensor(craft.storage())),
)


def test_states_set_data_and_never_behaviour(tmp_path):
  # Twice, since the first state could have replaced what takes the second.
  layer = _LAYER + _STATE + b"b" + _STATE + b"b"
  ordered = name("collections", "OrderedDict") + b")R" + _STATE + b"b"
  body = craft.dict_of(layer=layer, ordered=ordered)
  path = craft.write_zip(tmp_path / "a.pt", body, {"data/0": bytes(24)})
  weights = weight_files.read(path)
  assert weights.groups.keys() == {"layer"}
  assert weights.groups["layer"]["w"].shape == (2, 3)
  assert weights.metadata["layer"] == {"class_name": "Linear"}


@pytest.mark.parametrize(
    "body, words",
    [
        (name("torch", "FloatStorage") + _STATE + b"b", "a state of"),
        (craft.tensor(craft.storage()) + _STATE + b"b", "a state of"),
        (b"]" + _STATE + b"b", "a state of a list"),
        (b"}" + b"]b", "a state of a dict"),
        (_LAYER + b"]b", "attributes of 'Linear': got a list"),
        (call(craft.storage(), COMMAND), "a call of a Storage"),
        (call(text("os.system"), COMMAND), "a call of 'os.system'"),
        (call(name("torch", "float32"), COMMAND), "a call of 'torch.float32'"),
        (call(name("torch.nn.modules.os", "system"), COMMAND), "arguments"),
        (call(name("torch.nn.functional", "silu"), COMMAND), "a call of"),
        (name("collections", "OrderedDict") + b"]R", "a call of"),
        (name("collections", "OrderedDict") + b")}\x92", "opcode NEWOBJ_EX"),
        (craft.tuple_of(text("module"), _LAYER) + b"Q", "expected a storage"),
        (text("os.system") + b"Q", "expected a storage"),
        (b"Pos.system\n", "opcode PERSID"),
        (b"I7\n", "opcode INT"),
        (b"\x97", "opcode NEXT_BUFFER"),
        (b"\xff", "opcode 255"),
        (b"N" + b"N\x93", "STACK_GLOBAL requires str"),
        (
            call(
                name("torch._tensor", "_rebuild_from_type_v2"),
                name("torch.nn.modules.linear", "Linear"),
                name("torch", "Tensor"),
                craft.tuple_of(COMMAND),
                b"N",
            ),
            "class of a tensor",
        ),
        (
            call(
                name("copyreg", "_reconstructor"),
                name("collections", "OrderedDict"),
                name("builtins", "object"),
                b"N",
            ),
            "expected a module",
        ),
        (
            call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
            "plain numbers",
        ),
        (call(name("_codecs", "encode"), text("x"), text("rot13")), "latin1"),
    ],
)
def test_known_names_cannot_be_turned_into_code(
    body, words, tmp_path, monkeypatch
):
  path = tmp_path / "hostile.pt"
  craft.write_zip(path, body, {"data/0": bytes(24)})
  assert words in refusal(path, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "content",
    [
        craft.pickled(call(name("os", "system"), COMMAND)),
        b"",
        b"PK\x03\x04",
        craft.legacy(craft.dict_of()),
    ],
)
def test_nested_bytes_must_be_a_storage(content, tmp_path, monkeypatch):
  path = tmp_path / "hostile.pkl"
  path.write_bytes(craft.edm(craft.nested(content)))
  message = refusal(path, tmp_path, monkeypatch)
  assert "expected a storage" in message


def test_nesting_goes_one_level_deep(tmp_path, monkeypatch):
  body = craft.storage(view=b"N")
  records = (6).to_bytes(8, "little") + bytes(24)
  honest = craft.legacy(body, ["0"], records)
  path = tmp_path / "a.pkl"
  path.write_bytes(craft.edm(craft.nested(honest)))
  assert weight_files.read(str(path)).groups["ema"]["weight"].shape == (2, 3)
  deeper = functools.reduce(
      lambda inner, _: craft.legacy(craft.nested(inner)), range(2), honest
  )
  path.write_bytes(craft.edm(craft.nested(deeper)))
  message = refusal(path, tmp_path, monkeypatch)
  assert "torch.storage._load_from_bytes" in message


def test_storages_are_not_nested_in_torch_files(tmp_path, monkeypatch):
  path = tmp_path / "a.pt"
  _zip(path, craft.nested(craft.legacy(craft.storage(view=b"N"))))
  message = refusal(path, tmp_path, monkeypatch)
  assert "torch.storage._load_from_bytes" in message
