"""Config files: where they are and how they are read."""

import importlib.util
import pathlib
import types

import ml_collections

from bcm_jax import errors


def shipped_configs() -> list[pathlib.Path]:
  """The config files that come with the package, installed or checked out."""
  here = pathlib.Path(__file__).resolve().parents[1]
  for folder in (here / "configs", here.parent / "configs"):
    found = sorted(p for p in folder.glob("*.py") if p.name[0] != "_")
    if found:
      return found
  return []


def find_file(path: str) -> pathlib.Path:
  """A config file: as given, or else the shipped one of that name."""
  given = pathlib.Path(path)
  if given.is_file():
    return given
  shipped = {p.name: p for p in shipped_configs()}
  if given.name in shipped and given.parent.name in ("", "configs"):
    return shipped[given.name]
  folder = next(iter(shipped.values())).parent if shipped else "(none)"
  raise errors.UserError(
      f"no config file {path!r}{errors.nearest(given.name, shipped)} "
      f"(shipped in {folder}: {', '.join(shipped)})"
  )


def _run(file: pathlib.Path) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"{file} has no get_config()")
  return module


def read_file(path: str) -> ml_collections.ConfigDict:
  """Runs get_config() of a file; 'file.py:arg' passes arg to it."""
  name, _, arg = path.partition(":")
  file = find_file(name)
  module = _run(file)
  if not arg:
    return module.get_config()
  known = getattr(module, "VARIANTS", None)
  if known is not None and arg not in known:
    raise errors.unknown_name(f"variant of {file.name}", arg, known)
  return module.get_config(arg)


def all_variants() -> list[str]:
  """Everything shipped that --config takes: 'digits.py', 'cifar10.py:ict'."""
  names = []
  for file in shipped_configs():
    variants = getattr(_run(file), "VARIANTS", None)
    names += [f"{file.name}:{v}" for v in variants] if variants else [file.name]
  return names
