"""Config files: where they are and how they are read."""

import importlib.util
import pathlib

import ml_collections

from bcm_jax import errors


def shipped_configs() -> list[pathlib.Path]:
  """The config files that come with the package, installed or checked out."""
  here = pathlib.Path(__file__).resolve().parent
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


def read_file(path: str) -> ml_collections.ConfigDict:
  """Runs get_config() of a file; 'file.py:arg' passes arg to it."""
  name, _, arg = path.partition(":")
  file = find_file(name)
  spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"{file} has no get_config()")
  try:
    return module.get_config(arg) if arg else module.get_config()
  except (TypeError, ValueError) as e:
    if not arg:
      raise
    raise errors.UserError(f"--config={path}: {e}") from e
