"""The import rules of docs/architecture.md.

Each rule is a function from source text to a list of offences, so that a test
can show it a source that breaks the rule.
"""

import ast
from collections.abc import Iterator
import graphlib
import pathlib
import re

import pytest

from bcm_jax.config import registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bcm_jax"

# Top to bottom. A package imports from lower layers and, without cycles, from
# its own.
LAYERS = (
    {
        *("__init__", "__main__", "main", "train", "sample"),
        *("generate", "evaluation", "editing", "studio", "plots", "export"),
        *("tools", "release", "train_classifier"),
    },
    {"config"},
    {"training", "checkpoint"},
    {"methods", "sampling", "metrics"},
    {"interop", "diffusion", "data", "models"},
    {"errors", "utils"},
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}
# A command that keeps its name and runs code of the top layer.
COMMANDS = {"bcm_jax.interop.convert": "generate"}

# Names of methods that the engine must not contain, also of those to come. The
# registry and the files of methods/ add theirs.
METHOD_NAMES = set(registry.METHODS) | {
    *("bct", "bidirectional", "trajectory", "cm", "cmt", "consistency", "ecm"),
    *("ibct", "scm", "sct", "scd", "distribution_matching", "meanflow", "imm"),
}
# Code and data that may name methods.
METHODS_NAMED_IN = (
    "bcm_jax.methods.", "bcm_jax.config.registry", "bcm_jax.interop.families.",
    "bcm_jax.evaluation.published",
)
# (module, string) -> what else the string names.
OTHER_MEANINGS = {
    ("bcm_jax.config.schema", "edm"): "data.crop, after EDM's data tool",
    ("bcm_jax.data.resizing", "edm"): "data.crop, after EDM's data tool",
    ("bcm_jax.diffusion.preconditioning", "edm"): "method.preconditioning",
    ("bcm_jax.diffusion.preconditioning", "bcm"): "method.preconditioning",
    ("bcm_jax.diffusion.preconditioning", "ctm"): "method.preconditioning",
}
NOT_METHODS = {"__init__", "base"}

# A pure loss uses no engine, optimizer, config, device or collective.
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


def package_of(module: str) -> str:
  """Returns 'training' for 'bcm_jax.training.train_step'."""
  return COMMANDS.get(module) or (module.split(".") + ["__init__"])[1]


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
  """Yields (line, dotted target) of every import, also lazy and by name."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parts = module.split(".")[: -node.level]
        base = ".".join(parts + ([node.module] if node.module else []))
      yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)
    elif isinstance(node, ast.Call) and node.args:
      function = ast.unparse(node.func).split(".")[-1]
      name = node.args[0]
      if function in ("import_module", "__import__") and isinstance(
          name, ast.Constant
      ):
        yield node.lineno, str(name.value)


def package_imports(source: str, module: str) -> Iterator[tuple[int, str]]:
  """Yields (line, target) of the imports from bcm_jax."""
  for line, target in imports(ast.parse(source), module):
    ours = target.split(".")[0] == "bcm_jax"
    if ours and target != "bcm_jax.__version__":
      yield line, target


def layer_offences(source: str, module: str) -> list[str]:
  """Imports of `module` from a higher layer, or of unknown packages."""
  package, offences = package_of(module), []
  for line, target in package_imports(source, module):
    below = package_of(target)
    known = package in LAYER_OF and below in LAYER_OF
    if not known or LAYER_OF[package] > LAYER_OF[below] or (
        package == "models" and below != "models"
    ):
      offences.append(f"{module}:{line}: {package} may not import {target}")
  return offences


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of every identifier and string except docstrings."""
  skipped = set()
  for node in ast.walk(tree):
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
      skipped.add(body[0].value)
  line = 0
  for node in ast.walk(tree):
    line = getattr(node, "lineno", line)
    if node in skipped:
      continue
    for _, value in ast.iter_fields(node):
      for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
          yield line, text


def mentions(text: str, names: set[str]) -> set[str]:
  """Returns the names that are words of text: snake case, camel or plain."""
  text = text.replace("bcm_jax", "")
  camel = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", text)
  plain, camel = (
      "_" + re.sub(r"[^a-z0-9]+", "_", form.lower()) + "_"
      for form in (text, camel)
  )
  return {n for n in names if f"_{n}_" in plain or f"_{n}_" in camel}


def naming_offences(source: str, module: str) -> list[str]:
  """Identifiers and strings of `module` that name a method."""
  files = {path.stem for path in (PACKAGE / "methods").glob("*.py")}
  names = METHOD_NAMES | (files - NOT_METHODS)
  return [
      f"{module}:{line}: {text!r} names the method {found!r}"
      for line, text in texts(ast.parse(source))
      for found in sorted(mentions(text, names))
  ]


def special_case_offences(source: str, module: str) -> list[str]:
  """Strings, comparisons and imports of `module` that single out a method."""
  if module.startswith(METHODS_NAMED_IN):
    return []
  tree, offences = ast.parse(source), []
  for line, text in texts(tree):
    named = re.search(r"method\.name=\W*(\w+)", text)
    for name in (text, named and named[1]):
      if name in registry.METHODS and (module, name) not in OTHER_MEANINGS:
        offences.append(f"{module}:{line}: {text!r} names the method {name!r}")
  for node in ast.walk(tree):
    if isinstance(node, ast.Compare):
      for side in (node.left, *node.comparators):
        if re.search(r"method(\.name|\['name'\]|\.__class__)$|type\(.*method\)",
                     ast.unparse(side)):
          offences.append(f"{module}:{node.lineno}: compares a method's name")
  for line, target in package_imports(source, module):
    head, _, file = target.rpartition(".")
    if head == "bcm_jax.methods" and file != "base":
      offences.append(f"{module}:{line}: imports the method {file!r}")
  return offences


def dotted_uses(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
  """Yields imports and attribute chains with import aliases written out."""
  aliases = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for a in node.names:
        first = a.name.split(".")[0]
        aliases[a.asname or first] = a.name if a.asname else first
    elif isinstance(node, ast.ImportFrom) and node.module:
      aliases |= {
          a.asname or a.name: f"{node.module}.{a.name}" for a in node.names
      }
  yield from imports(tree, module)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      head, _, rest = ast.unparse(node).partition(".")
      if head in aliases:
        yield node.lineno, f"{aliases[head]}.{rest}"


def purity_offences(source: str, module: str) -> list[str]:
  """Uses of engine, optimizer, config or devices in a method's file."""
  return [
      f"{module}:{line}: methods may not use {use}"
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


def test_packages_import_only_from_lower_layers():
  assert not gather(layer_offences, ".")


def test_packages_have_no_import_cycles():
  graph: dict[str, set[str]] = {}
  for text, module in sources("."):
    package = package_of(module)
    for _, target in package_imports(text, module):
      if package_of(target) not in (package, "__init__"):
        graph.setdefault(package, set()).add(package_of(target))
  tuple(graphlib.TopologicalSorter(graph).static_order())  # No CycleError.


def test_engine_names_no_method():
  assert not gather(naming_offences, "training", "train.py")


def test_no_code_singles_out_a_method():
  assert not gather(special_case_offences, ".")


@pytest.mark.parametrize(
    "source",
    [
        'if options["name"] == "bcm":\n  pass',
        'KINDS = {"dmd2": 1}',
        "if config.method.name == other:\n  pass",
        "if config.method['name'] in NAMES:\n  pass",
        "if type(experiment.method) is X:\n  pass",
        "raise E(f\"{k}: train one with method.name='edm'\")",
        "from bcm_jax.methods import ctm",
    ],
)
def test_the_rule_on_special_cases_can_fail(source):
  assert special_case_offences(source, "bcm_jax.tools.x")
  assert not special_case_offences(source, "bcm_jax.methods.x")


def test_benchmarks_compare_no_method_name():
  for file in (ROOT / "benchmarks").glob("*.py"):
    offences = special_case_offences(file.read_text(), "benchmarks")
    assert not [line for line in offences if "compares" in line]


def test_methods_are_pure():
  assert not gather(purity_offences, "methods")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bcm_jax.diffusion.process", "from bcm_jax.methods import base"),
        ("bcm_jax.training.train_step", "def f():\n  from ..config import a"),
        (
            "bcm_jax.training.train_step",
            "import importlib\nimportlib.import_module('bcm_jax.train')",
        ),
        ("bcm_jax.models.adm", "from bcm_jax.errors import UserError"),
        ("bcm_jax.data.image_source", "from bcm_jax.attic import old"),
    ],
)
def test_layer_rule_can_fail(module, source):
  assert len(layer_offences(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bcm_jax.main", "from bcm_jax import train, evaluation, errors"),
        ("bcm_jax.training.train_step", "from ..methods.base import Method"),
        ("bcm_jax.models.adm", "from bcm_jax.models import layers"),
    ],
)
def test_layer_rule_accepts(module, source):
  assert not layer_offences(source, module)


@pytest.mark.parametrize(
    "source",
    ["def bcm_loss(x): pass", "if method == 'ect': pass", "class DMD2Step: 1"],
)
def test_naming_rule_can_fail(source):
  assert naming_offences(source, "bcm_jax.training.train_step")


def test_naming_rule_accepts_docstrings_and_comments():
  source = '"""Trains BCM."""\n\n\ndef f(method, direction):\n  return 1  # bcm'
  assert not naming_offences(source, "bcm_jax.training.train_step")


@pytest.mark.parametrize(
    "source",
    [
        "from bcm_jax.training import rng",
        "import jax as j\nn = j.local_devices()",
        "from jax import lax\ng = lax.pmean(1, 'data')",
    ],
)
def test_purity_rule_can_fail(source):
  assert purity_offences(source, "bcm_jax.methods.base")
