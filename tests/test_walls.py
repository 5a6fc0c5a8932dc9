"""The walls of docs/architecture.md: who may import whom, and say what.

Each wall is a function from source text to a list of offences, so that its
companion test can show it a source that breaks the wall.
"""

import ast
from collections.abc import Iterator
import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bcm_jax"

# Top to bottom. A room imports from lower floors and from itself.
FLOORS = (
    {"main"},
    {"train", "convert", "studio"},
    {"evaluation", "loop", "compile", "inspection", "pairs"},
    {"plots", "train_classifier", "watch"},
    {"generate"},
    {"editing", "rejection"},
    {"release"},
    {"runner"},
    {"guides"},
    {"runs"},
    {"planning", "provenance"},
    {"experiment"},  # A config as objects, for the commands.
    {"checks"},
    {"config"},
    {"names"},  # What the names in a config stand for.
    # Settings, flags and facts alone.
    {"options", "arguments", "config_files", "chips"},
    {"training"},
    {"methods", "sampling"},
    {"metrics"},  # Reads the weights of its feature networks.
    {"interop"},
    {"diffusion", "data"},
    {"models"},
)
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# Beneath all: rooms may import these, models excepted.
FOUNDATION = ("errors", "files", "command")
# The package's own __init__.py holds the version, and imports, late, what
# bcm_jax.load is of.
FACADE = "__init__"
FACADE_IMPORTS = ("editing",)

# Names of methods that the engine must not know. The files of methods/ add
# theirs.
METHOD_NAMES = {
    *("bcm", "bct", "bidirectional", "trajectory", "ctm", "cm", "cmt"),
    *("consistency", "ct", "ict", "ect", "ecm", "ibct", "scm", "sct", "scd"),
    *("dmd", "dmd2", "distribution_matching", "meanflow", "imm"),
}
NOT_METHODS = {"__init__", "base", "diffusion"}

# What a pure loss has no business with: the engine, optimisers, settings,
# devices and what talks between them.
METHODS_FORBIDDEN = (
    *("bcm_jax.training", "bcm_jax.config", "optax", "ml_collections"),
    *("absl.flags", "clu", "orbax", "tensorflow", "tensorflow_datasets"),
    *("jax.devices", "jax.local_devices", "jax.device_put", "jax.device_get"),
    *("jax.device_count", "jax.local_device_count", "jax.process_index"),
    *("jax.process_count", "jax.default_backend", "jax.default_device"),
    *("jax.sharding", "jax.make_mesh", "jax.set_mesh", "jax.shard_map"),
    *("jax.experimental", "jax.distributed", "jax.config", "jax.pmap"),
    *("jax.lax.with_sharding_constraint", "jax.lax.psum", "jax.lax.pmean"),
    *("jax.lax.pmax", "jax.lax.pmin", "jax.lax.all_gather"),
    *("jax.lax.axis_index", "jax.lax.ppermute", "jax.lax.all_to_all"),
)


def module_name(path: pathlib.Path) -> str:
  """Returns the dotted name of a file of the package."""
  return ".".join(path.relative_to(ROOT).with_suffix("").parts)


# A command that lives beside what it commands.
COMMANDS = {"bcm_jax.interop.convert": "convert"}


def room_of(module: str) -> str:
  """Returns 'training' for 'bcm_jax.training.step'."""
  return COMMANDS.get(module) or (module.split(".") + [FACADE])[1]


def resolve(node: ast.ImportFrom, module: str) -> str:
  """Returns the absolute module that a from-import names."""
  if not node.level:
    return node.module or ""
  base = module.split(".")[: -node.level]
  return ".".join(base + ([node.module] if node.module else []))


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
  """Yields (line, dotted target) of every import, also lazy and by name."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = resolve(node, module)
      yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)
    elif isinstance(node, ast.Call) and node.args:
      function = ast.unparse(node.func).split(".")[-1]
      name = node.args[0]
      if function in ("import_module", "__import__") and isinstance(
          name, ast.Constant
      ):
        yield node.lineno, str(name.value)


def floor_offences(source: str, module: str) -> list[str]:
  """Imports of `module` that do not go downwards."""
  room, offences = room_of(module), []
  if room not in FLOOR_OF and room not in (*FOUNDATION, FACADE):
    return [f"{module}: room {room!r} is on no floor; add it to FLOORS"]
  for line, target in imports(ast.parse(source), module):
    if target.split(".")[0] != "bcm_jax":
      continue
    if not may_import(room, target):
      offences.append(f"{module}:{line}: {room} may not import {target}")
  return offences


def may_import(room: str, target: str) -> bool:
  """Whether a file of `room` may import the dotted `target`."""
  below = room_of(target)
  if target == "bcm_jax.__version__":
    return room not in ("models", *FOUNDATION)
  if below in FOUNDATION:
    return room != "models"
  if room == FACADE:
    return below in FACADE_IMPORTS
  if room not in FLOOR_OF or below not in FLOOR_OF:
    return False
  if room == below:
    return True
  return FLOOR_OF[room] < FLOOR_OF[below]


def docstrings(tree: ast.Module) -> set[ast.AST]:
  """Returns the nodes that are docstrings."""
  found = set()
  for node in ast.walk(tree):
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
      found.add(body[0].value)
  return found


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of every identifier and string, docstrings left out."""
  skipped = docstrings(tree)
  line = 0
  for node in ast.walk(tree):
    line = getattr(node, "lineno", line)
    if node in skipped:
      continue
    for _, value in ast.iter_fields(node):
      for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
          yield line, text


def method_names() -> set[str]:
  """Returns METHOD_NAMES and the file names of methods/."""
  files = {path.stem for path in (PACKAGE / "methods").glob("*.py")}
  return METHOD_NAMES | (files - NOT_METHODS)


def mentions(text: str, names: set[str]) -> set[str]:
  """Returns the names that stand in text as words: snake, Camel or plain."""
  text = text.replace("bcm_jax", "")
  camel = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", text)
  plain, camel = (
      "_" + re.sub(r"[^a-z0-9]+", "_", form.lower()) + "_"
      for form in (text, camel)
  )
  return {n for n in names if f"_{n}_" in plain or f"_{n}_" in camel}


def naming_offences(source: str, module: str) -> list[str]:
  """Identifiers and strings of `module` that name a method."""
  names = method_names()
  return [
      f"{module}:{line}: {text!r} names the method {found!r}"
      for line, text in texts(ast.parse(source))
      for found in sorted(mentions(text, names))
  ]


def dotted_uses(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
  """Yields imports and attribute chains with import aliases written out."""
  aliases = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for a in node.names:
        first = a.name.split(".")[0]
        aliases[a.asname or first] = a.name if a.asname else first
    elif isinstance(node, ast.ImportFrom):
      base = resolve(node, module)
      aliases |= {a.asname or a.name: f"{base}.{a.name}" for a in node.names}
  yield from imports(tree, module)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      head, _, rest = ast.unparse(node).partition(".")
      if head in aliases:
        yield node.lineno, f"{aliases[head]}.{rest}"


def purity_offences(source: str, module: str) -> list[str]:
  """Uses of engine, optimiser, settings or devices in a method's file."""
  return [
      f"{module}:{line}: {use} is not for methods"
      for line, use in dotted_uses(ast.parse(source), module)
      if any(use == f or use.startswith(f + ".") for f in METHODS_FORBIDDEN)
  ]


def sources(*places: str) -> Iterator[tuple[str, str]]:
  """Yields (text, module name) of the files in places of the package."""
  for place in places:
    path = PACKAGE / place
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
      yield file.read_text(encoding="utf-8"), module_name(file)


def gather(check, *places: str) -> list[str]:
  """Runs a check over places of the package; at least one file each."""
  found = list(sources(*places))
  assert len(found) >= len(places)
  return [offence for text, name in found for offence in check(text, name)]


def test_rooms_import_only_downwards():
  assert not gather(floor_offences, ".")


def test_engine_names_no_method():
  assert not gather(
      naming_offences, "training", "train.py", "loop.py", "watch.py"
  )


def test_methods_are_pure():
  assert not gather(purity_offences, "methods")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bcm_jax.diffusion.process", "from bcm_jax.methods import base"),
        ("bcm_jax.diffusion.process", "import bcm_jax.data.source"),
        ("bcm_jax.methods.base", "from bcm_jax import sampling"),
        ("bcm_jax.sampling.plan", "from bcm_jax.training.rng import key"),
        ("bcm_jax.training.step", "from bcm_jax import config"),
        ("bcm_jax.training.step", "from ..config import build"),
        ("bcm_jax.training.step", "from .. import train"),
        ("bcm_jax.training.step", "def f():\n  import bcm_jax.main"),
        (
            "bcm_jax.training.step",
            "import importlib\nimportlib.import_module('bcm_jax.train')",
        ),
        ("bcm_jax.config", "from bcm_jax import train"),
        ("bcm_jax.editing.edit", "from bcm_jax.evaluation import evaluate"),
        ("bcm_jax.loop", "from bcm_jax import inspection"),
        ("bcm_jax.models.adm", "from bcm_jax.errors import UserError"),
        ("bcm_jax.models.adm", "from bcm_jax import __version__"),
        ("bcm_jax.errors", "from bcm_jax.models import adm"),
        ("bcm_jax.data.source", "import bcm_jax"),
        ("bcm_jax.data.source", "from bcm_jax.attic import old"),
        ("bcm_jax.__init__", "from bcm_jax.train import train_and_evaluate"),
        ("bcm_jax.attic.old", ""),
    ],
)
def test_floor_wall_catches(module, source):
  assert len(floor_offences(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bcm_jax.main", "from bcm_jax import train, evaluation, errors"),
        ("bcm_jax.plots.draw", "from bcm_jax.plots import figures"),
        ("bcm_jax.config", "from bcm_jax.models.adm import UNet"),
        ("bcm_jax.training.step", "from . import state\nimport jax"),
        ("bcm_jax.training.step", "from ..methods.base import Method"),
        ("bcm_jax.training.step", "from bcm_jax import __version__"),
        ("bcm_jax.models.adm", "from bcm_jax.models import layers"),
        ("bcm_jax.data.source", "from bcm_jax.errors import UserError"),
    ],
)
def test_floor_wall_lets_pass(module, source):
  assert not floor_offences(source, module)


@pytest.mark.parametrize(
    "source",
    [
        "def bcm_loss(x): pass",
        "state.ict = 1",
        "f(ctm=2)",
        "if method == 'ect': pass",
        "class DMD2Step: pass",
        "class ConsistencyStep: pass",
        "from x import BidirectionalLoss",
        "import x.trajectory as y",
        "raise ValueError(f'the {n} of sCM failed')",
        "def f():\n  '''Docstring.'''\n  return 'CTM'",
    ],
)
def test_naming_wall_catches(source):
  assert naming_offences(source, "bcm_jax.training.step")


def test_naming_wall_lets_pass():
  source = '''
    """Trains BCM, iCT and other consistency models."""
    from bcm_jax.methods.base import Method

    def predict(method: Method, direction, object, dict_of_scalars):
      """The consistency loss comes from the method."""
      return method.losses  # bcm
  '''
  assert not naming_offences(textwrap.dedent(source), "bcm_jax.training.step")


@pytest.mark.parametrize(
    "source",
    [
        "import optax",
        "from bcm_jax.training import rng",
        "from ..training import rng",
        "from bcm_jax import config",
        "from ml_collections import config_dict",
        "import jax\nn = len(jax.devices())",
        "import jax as j\nn = j.local_devices()",
        "from jax.sharding import NamedSharding",
        "from jax import sharding as s",
        "from jax import pmap",
        "import jax\nf = jax.pmap(abs)",
        "from jax import lax\ng = lax.pmean(1, 'data')",
        "import jax.experimental.shard_map",
    ],
)
def test_purity_wall_catches(source):
  assert purity_offences(source, "bcm_jax.methods.base")


def test_purity_wall_lets_pass():
  source = "import jax\nfrom jax import lax\nx = lax.stop_gradient(jax.grad)"
  assert not purity_offences(source, "bcm_jax.methods.base")
