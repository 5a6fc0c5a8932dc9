"""Pickles that would run code are refused by name, and nothing runs."""

import copyreg
import functools
import os
import pathlib
import pickle

import pytest

from bcm_jax.errors import UserError
from bcm_jax.interop import weight_files
from tests.interop import craft
from tests.interop.craft import call
from tests.interop.craft import name
from tests.interop.craft import text

TRACE = "hostile_code_ran"
COMMAND = text(f"touch {TRACE}")
SOURCE = text(f"open({TRACE!r}, 'w')")


def _stacked(module: str, attribute: str) -> bytes:
  return text(module) + text(attribute) + b"\x93"


# A body of opcodes, and the name that the error must speak of.
HOSTILE = {
    "reduce": (call(name("os", "system"), COMMAND), "os.system"),
    "posix": (call(name("posix", "system"), COMMAND), "posix.system"),
    "eval": (call(name("builtins", "eval"), SOURCE), "builtins.eval"),
    "eval_of_python_2": (call(name("__builtin__", "eval"), SOURCE), "eval"),
    "exec": (call(name("builtins", "exec"), SOURCE), "builtins.exec"),
    "getattr": (call(name("builtins", "getattr"), b"N"), "builtins.getattr"),
    "stack_global": (call(_stacked("os", "system"), COMMAND), "os.system"),
    "new_object": (
        name("subprocess", "Popen") + craft.tuple_of(COMMAND) + b"\x81",
        "subprocess.Popen",
    ),
    "new_object_with_names": (
        name("subprocess", "Popen") + craft.tuple_of(COMMAND) + b"}\x92",
        "subprocess.Popen",
    ),
    "inst": (b"(" + COMMAND + b"ios\nsystem\n", "os.system"),
    "obj": (b"(" + name("os", "system") + COMMAND + b"o", "os.system"),
    "never_called": (name("os", "system"), "os.system"),
    "dotted": (
        name("collections", "OrderedDict.__class__"),
        "collections.OrderedDict.__class__",
    ),
    "dotted_on_the_stack": (
        _stacked("collections", "OrderedDict.__init__.__globals__"),
        "OrderedDict.__init__.__globals__",
    ),
    "dotted_layer": (
        name("torch.nn.modules.module", "Module.__init__.__globals__"),
        "torch.nn.modules.module.Module.__init__.__globals__",
    ),
    "dotted_into_a_known_one": (
        name("torch", "_utils._rebuild_tensor_v2"),
        "torch._utils._rebuild_tensor_v2",
    ),
    "factory": (
        call(name("collections", "defaultdict"), name("os", "system")),
        "os.system",
    ),
    "torch_load": (call(name("torch", "load"), COMMAND), "torch.load"),
    "pickle_in_a_pickle": (
        call(name("pickle", "loads"), craft.blob(b"")),
        "pickle.loads",
    ),
    "persistence_internals": (
        call(name("torch_utils.persistence", "_src_to_module"), SOURCE),
        "torch_utils.persistence._src_to_module",
    ),
    "numpy_run": (
        call(name("numpy.testing._private.utils", "runstring"), SOURCE, b"}"),
        "numpy.testing._private.utils.runstring",
    ),
    "import": (
        call(name("importlib", "import_module"), text("antigravity")),
        "importlib.import_module",
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


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_code_is_refused_by_name(case, container, tmp_path, monkeypatch):
  body, named = HOSTILE[case]
  path = tmp_path / "hostile.pt"
  container(path, body)
  message = refusal(path, tmp_path, monkeypatch)
  assert named in message
  assert "could run code" in message and "refused" in message


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


def test_extensions_are_refused_even_when_registered(tmp_path, monkeypatch):
  # The unpickler looks into this cache before it asks find_class.
  monkeypatch.setitem(copyreg._extension_cache, 200, os.system)
  body = call(b"\x82\xc8", COMMAND)
  monkeypatch.chdir(tmp_path)
  pickle.loads(craft.pickled(body))
  (tmp_path / TRACE).unlink()
  for opcode in (b"\x82\xc8", b"\x83\xc8\x00", b"\x84\xc8\x00\x00\x00"):
    path = tmp_path / "hostile.pt"
    _zip(path, call(opcode, COMMAND))
    assert "extension 200" in refusal(path, tmp_path, monkeypatch)


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
        (name("torch", "FloatStorage") + _STATE + b"b", "sets the state"),
        (craft.tensor(craft.storage()) + _STATE + b"b", "sets the state"),
        (b"]" + _STATE + b"b", "sets the state of a list"),
        (b"}" + b"]b", "sets the state of a dict"),
        (_LAYER + b"]b", "attributes in a list"),
        (name("argparse", "Namespace") + b")R" + b"]b", "attributes in a list"),
        (call(craft.storage(), COMMAND), "calls a Storage"),
        (call(text("os.system"), COMMAND), "calls a str"),
        (call(name("torch", "float32"), COMMAND), "calls 'torch.float32'"),
        (call(name("torch.nn.modules.os", "system"), COMMAND), "arguments"),
        (call(name("torch.nn.functional", "silu"), COMMAND), "calls"),
        (b"(" + name("collections", "OrderedDict") + b"o", "opcode b'o'"),
        (b"(icollections\nOrderedDict\n", "INST"),
        (craft.tuple_of(text("module"), _LAYER) + b"Q", "than a storage"),
        (text("os.system") + b"Q", "than a storage"),
        (b"Pos.system\n", "opcode b'P'"),
        (b"I7\n", "opcode b'I'"),
        (b"N" + b"N\x93", "by something else than text"),
        (
            call(
                name("torch._tensor", "_rebuild_from_type_v2"),
                name("torch.nn.modules.linear", "Linear"),
                name("torch", "Tensor"),
                craft.tuple_of(COMMAND),
                b"N",
            ),
            "class of its own",
        ),
        (
            call(
                name("copyreg", "_reconstructor"),
                name("collections", "OrderedDict"),
                name("builtins", "object"),
                b"N",
            ),
            "no module",
        ),
        (
            call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
            "plain numbers",
        ),
        (call(name("_codecs", "encode"), text("x"), text("rot13")), "encodes"),
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
  assert "nests something else than a storage" in message


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
