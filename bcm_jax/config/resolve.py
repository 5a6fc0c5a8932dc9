"""Config files and command-line overrides to a complete config.

A config file has `get_config()`, which returns a ConfigDict. It is resolved
against the classes that it names (config/registry.py): unknown keys and names
are errors with the nearest known one, values are checked by type, defaults are
filled in. The result is complete and is written to the run's config.json.
"""

import ast
from collections.abc import Mapping
import dataclasses
import importlib.util
import json
import os
import pathlib
import types
import typing
from typing import Any

from flax import traverse_util
import ml_collections

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.config import schema
from bcm_jax.training import optim
from bcm_jax.utils import files
from bcm_jax.utils import hashing

SECTIONS = {
    "data": schema.Data,
    "optimizer": optim.Optimizer,
    "training": schema.Training,
    "parallel": schema.Parallel,
    "checkpoint": schema.Checkpoint,
    "log": schema.Log,
    "sample": schema.Sample,
    "invert": schema.Invert,
    "edit": schema.Edit,
    "eval": schema.Eval,
    "search": schema.Search,
}
# Keys that span the run unless a config says otherwise.
_SPANS = (("method", "curriculum_steps"), ("optimizer", "schedule_steps"))
# What may differ between a run and the config that resumes it.
_FREE = (
    "parallel", "checkpoint", "log", "sample", "invert", "edit", "eval",
    "search", "training.max_consecutive_nonfinite", "training.max_rollbacks",
    "training.watchdog_timeout_secs", "data.path", "data.data_dir",
    "data.threads", "data.pairs",
)


# Files ---------------------------------------------------------------------


def shipped_configs() -> list[pathlib.Path]:
  """Returns the config files of the package, installed or checked out."""
  here = pathlib.Path(__file__).resolve().parents[1]
  for folder in (here / "configs", here.parent / "configs"):
    found = sorted(p for p in folder.glob("*.py") if p.name[0] != "_")
    if found:
      return found
  return []


def find_file(path: str) -> pathlib.Path:
  """Finds a config file: the path itself, or a shipped one of that name."""
  file = pathlib.Path(path)
  if file.is_file():
    return file
  shipped = {p.name: p for p in shipped_configs()}
  if file.name in shipped and file.parent.name in ("", "configs"):
    return shipped[file.name]
  folder = next(iter(shipped.values())).parent if shipped else "(none)"
  raise errors.UserError(
      f"no config file {path!r}{errors.nearest(file.name, shipped)} "
      f"(shipped in {folder}: {', '.join(shipped)})"
  )


def run_file(file: pathlib.Path) -> types.ModuleType:
  """Imports a config file as a module with a `get_config`."""
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
  module = run_file(file)
  if not arg:
    return module.get_config()
  known = getattr(module, "VARIANTS", None)
  if known is not None and arg not in known:
    raise errors.unknown_name(f"variant of {file.name}", arg, known)
  return module.get_config(arg)


# Resolving -----------------------------------------------------------------


def resolve(
  raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
  """Completes and checks a config.

  Args:
    raw: ConfigDict of a file, or the dict of a config.json.
    overrides: 'section.key' -> text, as on the command line.

  Returns:
    A locked ConfigDict with every key of every section.

  Raises:
    UserError: unknown section, key, name, or a value of the wrong type.
  """
  if isinstance(raw, ml_collections.ConfigDict):
    raw = raw.to_dict()
  given = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
  for path, text in (overrides or {}).items():
    _set(given, path, text)
  known = ["seed", "model", "method", "auxiliary_optimizer", *SECTIONS]
  for section in given:
    if section not in known:
      raise errors.unknown_name("config section", section, known)
  full: dict[str, Any] = {"seed": _convert(given.get("seed", 0), int, "seed")}
  full["training"] = _fill("training", given, schema.Training)
  name, method = _look_up("method", given, registry.METHODS)
  given["method"] = {**method.preset.options, **given["method"]}
  classes = SECTIONS | {"method": method.cls}
  for section, key in _SPANS:
    if key in _keys(classes[section]):
      spans = given.setdefault(section, {})
      spans.setdefault(key, full["training"]["num_steps"])
  for section, cls in SECTIONS.items():
    full[section] = _fill(section, given, cls)
  if "auxiliary_optimizer" in given and not method.cls.auxiliary_networks:
    raise errors.UserError(
        "config.auxiliary_optimizer is for networks besides the sampled one, "
        f"and method.name={name!r} has none; leave it out"
    )
  if method.cls.auxiliary_networks:
    # Keys that it does not set are those of section optimizer.
    section = "auxiliary_optimizer"
    given[section] = {**full["optimizer"], **given.get(section, {})}
    full[section] = _fill(section, given, optim.Optimizer)
  model_name, model = _look_up("model", given, registry.MODELS)
  given["model"] = {**model.preset, **given["model"]}
  full["model"] = {"name": model_name} | _fill("model", given, model.cls)
  frozen_keys: dict[str, tuple[Any, Any]] = {}
  for part, declared in method.cls.frozen.items():
    frozen_keys |= declared.keys(part)
  full["method"] = {"name": name} | _fill(
      "method", given, method.cls, frozen_keys
  )
  return ml_collections.ConfigDict(full).lock()


def _set(given: dict[str, Any], path: str, text: str) -> None:
  *sections, key = path.split(".")
  if len(sections) > 1:
    raise errors.UserError(
      f"unknown config key {path!r}; keys are config.section.key"
    )
  if not sections:
    if key != "seed":
      raise errors.unknown_name("config key", key, ["seed"])
    given[key] = text
    return
  given.setdefault(sections[0], {})
  if not isinstance(given[sections[0]], dict):
    raise errors.UserError(f"config.{sections[0]} has no keys below it")
  given[sections[0]][key] = text


def _look_up(section, given, table) -> tuple[str, Any]:
  name = given.get(section, {}).get("name")
  if name not in table:
    raise errors.unknown_name(f"{section}.name", str(name), table)
  return name, table[name]


def _keys(cls: type) -> dict[str, tuple[Any, Any]]:
  """Returns key -> (type, default) of the fields that a config can set."""
  hints = typing.get_type_hints(cls)
  keys = {}
  for field in dataclasses.fields(cls):
    settable = field.default is not dataclasses.MISSING
    plain = not callable(field.default) and field.name not in ("parent", "name")
    if cls in SECTIONS.values() and field.name == "name":
      plain = True
    if settable and plain and field.init:
      keys[field.name] = (hints[field.name], field.default)
  return keys


def _fill(section, given, cls, extra=None) -> dict[str, Any]:
  keys = _keys(cls) | (extra or {})
  values = given.get(section, {})
  if not isinstance(values, Mapping):
    raise errors.UserError(f"config.{section} must be a section, not {values}")
  for key in values:
    if key not in keys and key != "name":
      kind = values.get("name")
      of = f" of {kind!r}" if isinstance(kind, str) else ""
      raise errors.unknown_name(
        f"config key{of}",
        f"{section}.{key}",
        [f"{section}.{k}" for k in keys],
      )
  return {
    key: _convert(values.get(key, default), hint, f"{section}.{key}")
    for key, (hint, default) in keys.items()
  }


def _convert(value: Any, hint: Any, path: str) -> Any:
  """Checks a value, or parses its text, by a type hint."""
  try:
    return _cast(value, hint)
  except (TypeError, ValueError, SyntaxError) as e:
    if isinstance(e, errors.UserError):
      raise
    if typing.get_origin(hint) is typing.Literal:
      choices = typing.get_args(hint)
      raise errors.unknown_name(f"config.{path}", str(value), choices) from e
    want = getattr(hint, "__name__", None) or str(hint)
    if typing.get_origin(hint):
      want = str(hint).replace("typing.", "")
    raise errors.UserError(
      f"config.{path} must be {want}, not {value!r}"
    ) from e


def _cast(value: Any, hint: Any) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value in (None, "None", "none"):
      return None
    return _cast(value, next(a for a in args if a is not type(None)))
  if origin is typing.Literal:
    if value not in args:
      raise ValueError(value)
    return value
  if origin is tuple:
    if isinstance(value, str):
      literal = value[:1] in ("(", "[") or (args[0] is not str and value)
      value = (
        ast.literal_eval(value)
        if literal
        else tuple(v.strip() for v in value.split(",") if v.strip())
      )
    if not isinstance(value, (list, tuple)):
      value = (value,)
    return tuple(_cast(v, args[0]) for v in value)
  if hint is str:
    if not isinstance(value, str):
      raise TypeError(value)
    return value
  if isinstance(value, str):
    value = (
      {"true": True, "false": False}.get(value.lower(), None)
      if hint is bool
      else ast.literal_eval(value)
    )
  if hint is float and type(value) in (int, float):
    return float(value)
  if hint is int and type(value) is float and value.is_integer():
    return int(value)
  if type(value) is not hint:
    raise TypeError(value)
  return value


# Comparing and storing -----------------------------------------------------


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns plain nested dicts, as read from config.json."""
  return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def digest(config: ml_collections.ConfigDict) -> str:
  """Returns twelve hex digits that identify a resolved config."""
  return hashing.json_digest(to_json(config))[:12]


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns 'section.key' -> value."""
  return traverse_util.flatten_dict(to_json(config), sep=".")


def difference(
  old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
  """Returns the differing keys: 'section.key' -> (old value, new value)."""
  a, b = flatten(old), flatten(new)
  return {
    k: (a.get(k), b.get(k))
    for k in sorted(a.keys() | b.keys())
    if a.get(k) != b.get(k)
  }


def check_resume(
  run: ml_collections.ConfigDict, asked: ml_collections.ConfigDict
) -> None:
  """Raises UserError unless a run may resume under another config.

  Sections of logging, saving, sampling and evaluation may change, and so may a
  larger number of steps if curriculum and learning-rate schedule stay.
  """
  frozen = registry.METHODS[run.method.name].cls.frozen
  free = _FREE + tuple(
      f"method.{path}"
      for part, declared in frozen.items() for path in declared.paths(part)
  )
  changed = {
      k: v
      for k, v in difference(run, asked).items()
      if k.split(".")[0] not in free and k not in free
      and not (k == "training.num_steps" and v[1] > v[0])
  }
  if not changed:
    return
  keep = " ".join(
    f"--config.{'.'.join(k)}={changed['.'.join(k)][0]}"
    for k in _SPANS
    if ".".join(k) in changed
  )
  raise errors.UserError(
    "the work directory holds a run with another config: "
    + "; ".join(
      f"{k} is {a!r} there, {b!r} here" for k, (a, b) in changed.items()
    )
    + ". Use another --workdir, or the run's own values"
    + (f" ({keep})" if keep else "")
  )


def write(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes workdir/config.json atomically."""
  files.write_json(os.path.join(workdir, "config.json"), to_json(config))


def of_run(
  workdir: str, overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict | None:
  """Returns the config of the run in a work directory, or None."""
  path = pathlib.Path(workdir) / "config.json"
  if not path.is_file():
    return None
  try:
    raw = json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise errors.UserError(
      f"{path} is damaged ({e}); restore it, or pass --config"
    ) from e
  return resolve(raw, overrides)


def of_existing_run(
  workdir: str, overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
  """Returns the config of the run in a work directory.

  Args:
    workdir: of the run.
    overrides: 'section.key' -> text.

  Raises:
    UserError: no run in workdir.
  """
  config = of_run(workdir, overrides)
  if config is None:
    raise errors.UserError(
      f"{workdir} holds no run (no config.json); give the work directory of "
      "one, trained or converted"
    )
  return config


def load(
  file: str | None,
  overrides: Mapping[str, str],
  workdir: str | None = None,
  of_run_too: bool = False,
) -> ml_collections.ConfigDict:
  """Returns the config of a command line: of a file, or of the run.

  Args:
    file: config file, or None.
    overrides: 'section.key' -> text.
    workdir: directory of a run, or None.
    of_run_too: without a file, use the config of the run in workdir.
  """
  if file is not None:
    return resolve(read_file(file), overrides)
  run = None
  if workdir is not None and of_run_too:
    run = of_run(workdir, overrides)
  if run is None:
    names = ", ".join(p.name for p in shipped_configs())
    raise errors.UserError(
      f"--config is missing, and --workdir={workdir} holds no run to take "
      f"it from; pass --config=configs/NAME, shipped are {names}"
    )
  return run
