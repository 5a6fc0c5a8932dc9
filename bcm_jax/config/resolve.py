"""Resolves config files and command-line overrides to a complete config.

A config file defines `get_config()`, which returns a ConfigDict. It is resolved
against the classes that it names (config/registry.py): unknown keys and names
are errors that suggest the nearest match, values are checked by type, and
defaults are added. The complete result is written to config.json of the run.
"""

import ast
from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import types
import typing
from typing import Any

from flax import traverse_util
import ml_collections
import numpy as np

from bcm_jax import errors
from bcm_jax.config import ranges
from bcm_jax.config import registry
from bcm_jax.config import renamed
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
# Keys whose default is training.num_steps.
_SPANS = (("method", "curriculum_steps"), ("optimizer", "schedule_steps"))
# Names of keys in other programs.
_OTHER_NAMES = {
    "lr": "optimizer.learning_rate", "bs": "training.batch_size",
    "steps": "training.num_steps", "max_steps": "training.num_steps",
    "total_steps": "training.num_steps", "dataset": "data.name",
    "resolution": "data.size", "image_size": "data.size",
    "ema": "training.ema_rates", "ema_rate": "training.ema_rates",
    "ema_decay": "training.ema_rates", "precision": "model.dtype",
    "fp16": "model.dtype", "teacher": "method.teacher",
    "resume": "training.init_from", "cfg_scale": "sample.guidance",
}
# Sections and keys that may change when a run resumes.
_FREE = (
    "parallel", "checkpoint", "log", "sample", "invert", "edit", "eval",
    "search", "training.max_consecutive_nonfinite", "training.max_rollbacks",
    "training.watchdog_timeout_secs", "data.path", "data.data_dir",
    "data.threads", "data.pairs", "data.allow_fewer_classes",
)


# Files ---------------------------------------------------------------------


def shipped_configs() -> list[pathlib.Path]:
  """Returns the config files of the package, installed or in a checkout."""
  package = pathlib.Path(__file__).resolve().parents[1]
  for folder in (package / "configs", package.parent / "configs"):
    paths = sorted(p for p in folder.glob("*.py") if p.name[0] != "_")
    if paths:
      return paths
  return []


def find_file(path: str) -> pathlib.Path:
  """Returns the path of a config file.

  Args:
    path: path of a file, or name of a shipped config.

  Raises:
    UserError: neither exists.
  """
  file = pathlib.Path(path)
  if file.is_file():
    return file
  shipped = {p.name: p for p in shipped_configs()}
  if file.name in shipped and file.parent.name in ("", "configs"):
    return shipped[file.name]
  raise errors.UserError(
      f"--config: got {path!r}, expected a file or one of "
      f"{', '.join(shipped)}; correct the path"
      f"{errors.nearest(file.name, shipped)}"
  )


def run_file(file: pathlib.Path) -> types.ModuleType:
  """Imports a config file.

  Raises:
    UserError: not a Python file, or it has no `get_config`.
  """
  if file.suffix != ".py":
    raise errors.UserError(
        f"--config: got {file}, expected a .py file; shipped configs are in "
        "configs/"
    )
  spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise errors.UserError(
        f"{file}: got no get_config(), expected a config file; define it"
    )
  return module


def read_file(path: str) -> ml_collections.ConfigDict:
  """Returns get_config() of a file, or get_config(arg) for 'file.py:arg'.

  Raises:
    UserError: no such file, or arg is not in its VARIANTS.
  """
  name, _, arg = path.partition(":")
  file = find_file(name)
  module = run_file(file)
  if not arg:
    return module.get_config()
  variants = getattr(module, "VARIANTS", None)
  if not inspect.signature(module.get_config).parameters:
    raise errors.UserError(
        f"--config: got {path}, expected {name}, which has no variants"
    )
  if variants is not None and arg not in variants:
    raise errors.unknown_name(f"variant of {file.name}", arg, variants)
  return module.get_config(arg)


# Resolving -----------------------------------------------------------------


def resolve(
  raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
  """Completes a config with defaults and checks keys and types.

  Args:
    raw: ConfigDict of a config file, or the dict of a config.json.
    overrides: 'section.key' -> text, as on the command line.

  Returns:
    A locked ConfigDict with every key of every section.

  Raises:
    UserError: unknown section, key, name, or a value of the wrong type.
  """
  if isinstance(raw, ml_collections.ConfigDict):
    raw = raw.to_dict()
  partial = {
      k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()
  }
  for path, text in (overrides or {}).items():
    _set(partial, path, text)
  sections = ["seed", "model", "method", "auxiliary_optimizer", *SECTIONS]
  for section in partial:
    if section not in sections:
      raise errors.UserError(
          f"config section: got {section!r}, expected one of "
          f"{', '.join(sorted(sections))}{_suggestion(section, sections)}"
      )
    if section != "seed" and not isinstance(partial[section], dict):
      raise errors.UserError(
          f"config.{section}: got {str(partial[section])[:80]!r}, expected a "
          "section of keys; correct config.json"
      )
  full: dict[str, Any] = {"seed": _convert(partial.get("seed", 0), int, "seed")}
  full["training"] = _fill("training", partial, schema.Training)
  name, method = _look_up("method", partial, registry.METHODS)
  partial["method"] = {**method.preset.options, **partial["method"]}
  classes = SECTIONS | {"method": method.cls}
  for section, key in _SPANS:
    if key in _keys(classes[section]):
      spans = partial.setdefault(section, {})
      spans.setdefault(key, full["training"]["num_steps"])
  for section, cls in SECTIONS.items():
    full[section] = _fill(section, partial, cls)
  if "auxiliary_optimizer" in partial and not method.cls.auxiliary_networks:
    raise errors.UserError(
        "config.auxiliary_optimizer: got a section, expected it only for "
        "methods with a second trained network, unlike "
        f"method.name={name!r}; remove it"
    )
  if method.cls.auxiliary_networks:
    # Its defaults are the values of section optimizer.
    section = "auxiliary_optimizer"
    partial[section] = {**full["optimizer"], **partial.get(section, {})}
    full[section] = _fill(section, partial, optim.Optimizer)
  model_name, model = _look_up("model", partial, registry.MODELS)
  partial["model"] = {**model.preset, **partial["model"]}
  full["model"] = {"name": model_name} | _fill("model", partial, model.cls)
  frozen_keys: dict[str, tuple[Any, Any]] = {}
  for part, declared in method.cls.frozen.items():
    frozen_keys |= declared.keys(part)
  full["method"] = {"name": name} | _fill(
      "method", partial, method.cls, frozen_keys
  )
  return ml_collections.ConfigDict(full).lock()


def _set(partial: dict[str, Any], path: str, text: str) -> None:
  section, dot, key = path.partition(".")
  if path == "seed":
    partial[path] = text
    return
  if not dot or "." in key:
    raise errors.UserError(
        f"config key: got {path!r}, expected SECTION.KEY or 'seed'"
        f"{_suggestion(path, _all_keys())}"
    )
  if not isinstance(partial.setdefault(section, {}), dict):
    raise errors.UserError(
      f"config.{section}: got key {key!r}, expected a value without keys; "
      f"write --config.{section}=VALUE"
    )
  partial[section][key] = text


def _all_keys() -> list[str]:
  """Returns all keys as 'section.key', those of training first."""
  classes = [("training", schema.Training), *SECTIONS.items()]
  classes += [("method", m.cls) for m in registry.METHODS.values()]
  classes += [("model", m.cls) for m in registry.MODELS.values()]
  return list(dict.fromkeys(
      f"{section}.{key}" for section, cls in classes for key in _keys(cls)
  ))


def _suggestion(path: str, known: Iterable[str]) -> str:
  """Returns '; did you mean ...?' for an unknown section or key, or ''.

  Args:
    path: 'section.key', 'key' or 'section'.
    known: the accepted names.
  """
  known, (section, _, key) = list(known), path.rpartition(".")
  new = renamed.KEYS.get(section, {}).get(key)
  if path in renamed.SECTIONS:
    names = [renamed.SECTIONS[path]]
  elif new is not None:
    names = [f"{section}.{new}"]
  elif key in _OTHER_NAMES:
    names = [_OTHER_NAMES[key]]
  else:
    every = [k for k in _all_keys() if k != path]
    last = {k.rpartition(".")[2]: k for k in reversed([*every, *known])}
    names = (
        [k for k in every if k.endswith(f".{key}")]
        or difflib.get_close_matches(path, known, n=1, cutoff=0.8)
        or [last[k] for k in difflib.get_close_matches(key, last, n=1)]
    )
  if not names:
    return ""
  return f"; did you mean {' or '.join(map(repr, names[:3]))}?"


def _look_up(section, partial, table) -> tuple[str, Any]:
  values = partial.get(section, {})
  name = values.get("name") if isinstance(values, Mapping) else None
  if not isinstance(name, str) or name not in table:
    raise errors.unknown_name(f"{section}.name", str(name), table)
  return name, table[name]


def _keys(cls: type) -> dict[str, tuple[Any, Any]]:
  """Returns key -> (type, default) for the config keys among a class's fields.
  """
  hints = typing.get_type_hints(cls)
  keys = {}
  for field in dataclasses.fields(cls):
    has_default = field.default is not dataclasses.MISSING
    plain = not callable(field.default) and field.name not in ("parent", "name")
    if cls in SECTIONS.values() and field.name == "name":
      plain = True
    if has_default and plain and field.init:
      keys[field.name] = (hints[field.name], field.default)
  return keys


def _fill(section, partial, cls, extra=None) -> dict[str, Any]:
  keys = _keys(cls) | (extra or {})
  values = partial.get(section, {})
  if not isinstance(values, Mapping):
    raise errors.UserError(
      f"config.{section}: got {values}, expected a section of keys; write "
      f"--config.{section}.KEY=VALUE"
    )
  for key in values:
    if key not in keys and key != "name":
      kind = values.get("name")
      of = f" of {kind!r}" if isinstance(kind, str) else ""
      known = sorted(f"{section}.{k}" for k in keys)
      path = f"{section}.{key}"
      raise errors.UserError(
          f"config key{of}: got {path!r}, expected one of {', '.join(known)}"
          f"{_suggestion(path, known)}"
      )
  return {
    key: _convert(values.get(key, default), hint, f"{section}.{key}")
    for key, (hint, default) in keys.items()
  }


def argument(name: str, value: Any, key: str) -> Any:
  """Returns an argument of a Python call, checked like the config key `key`.

  Args:
    name: name of the argument, for the error.
    value: the argument.
    key: 'section.key' of schema.py, with the type and range of the argument.

  Raises:
    UserError: the value is of another type, or out of range.
  """
  section, _, field = key.partition(".")
  return _convert(value, _keys(SECTIONS[section])[field][0], key, name)


def _convert(value: Any, hint: Any, path: str, name: str | None = None) -> Any:
  """Converts a value or its text to the type of a hint.

  Args:
    value: value of a config, or text of the command line.
    hint: type of the field.
    path: 'section.key', which determines the range (config/ranges.py).
    name: name in errors; None is `path`.

  Raises:
    UserError: the value is not of that type, or out of range.
  """
  name = path if name is None else name
  try:
    converted = _cast(value, hint)
  # The errors of ast.literal_eval and float.
  except (
      *(TypeError, ValueError, SyntaxError, OverflowError),
      *(MemoryError, RecursionError),
  ) as e:
    if isinstance(e, errors.UserError):
      raise
    if typing.get_origin(hint) is typing.Literal:
      choices = typing.get_args(hint)
      raise errors.unknown_name(name, str(value), choices) from e
    expected = getattr(hint, "__name__", None) or str(hint)
    if typing.get_origin(hint):
      expected = str(hint).replace("typing.", "")
    raise errors.UserError(
      f"{name}: got {short(value)}, expected {expected}; correct the value"
    ) from e
  expected = ranges.problem(path, converted)
  if expected is not None:
    raise errors.UserError(
        f"{name}: got {short(value)}, expected {expected}; correct the value"
    )
  return converted


def short(value: Any) -> str:
  """Returns one line of at most 80 characters."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _cast(value: Any, hint: Any) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if isinstance(value, np.generic):
    value = value.item()
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
    # NaN and infinity, also 1e400: no key has a use for them.
    if not math.isfinite(value):
      raise ValueError(value)
    return float(value)
  if hint is int and type(value) is float and value.is_integer():
    return int(value)
  if type(value) is not hint:
    raise TypeError(value)
  return value


# Comparing and storing -----------------------------------------------------


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as nested dicts of JSON values."""
  return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def digest(config: ml_collections.ConfigDict) -> str:
  """Returns a digest of a resolved config, twelve hex digits."""
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
  run: ml_collections.ConfigDict, requested: ml_collections.ConfigDict
) -> None:
  """Checks that a run may resume under a config.

  Sections of logging, saving, sampling and evaluation may change.
  training.num_steps may increase if curriculum and learning-rate schedule stay
  the same.

  Args:
    run: config of the run.
    requested: config of the command line.

  Raises:
    UserError: another key differs.
  """
  frozen = registry.METHODS[run.method.name].cls.frozen
  free = _FREE + tuple(
      f"method.{path}"
      for part, declared in frozen.items() for path in declared.paths(part)
  )
  changed = {
      k: v
      for k, v in difference(run, requested).items()
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
    "--workdir: got a run of another config, expected the same values; "
    + ", ".join(
      f"{k} is {old!r} there, {new!r} here"
      for k, (old, new) in changed.items()
    )
    + "; put them back to resume"
    + (f" (for more steps: {keep})" if keep else "")
    + ", or start from these weights with "
    "--config.training.init_from=THIS_WORKDIR and another --workdir"
  )


def check_checkpoint(
  meta: Mapping[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> None:
  """Checks that a checkpoint was written under the config of this run.

  The work directory's config.json is not compared: it may have been edited,
  replaced or lost, while the state of the checkpoint is what continues.

  Args:
    meta: metadata of a checkpoint.
    config: resolved config of the command line.
    workdir: work directory, for the error.

  Raises:
    UserError: another value, or no config in the metadata.
  """
  if not isinstance(meta.get("config"), Mapping):
    raise errors.UserError(
      f"--workdir: got {workdir} with a checkpoint without a config, expected "
      "one that training wrote; move checkpoints/ away to start from step 0, "
      "or use another --workdir"
    )
  try:
    check_resume(resolve(meta["config"]), config)
  except errors.UserError as e:
    raise errors.UserError(
      f"{e}; compared with the config in the checkpoints of {workdir}; if "
      "these are of another run, move checkpoints/ away"
    ) from e


def check_network(
  saved: ml_collections.ConfigDict, run: ml_collections.ConfigDict, workdir: str
) -> None:
  """Checks that config.json defines the network and method of a checkpoint.

  Args:
    saved: config in the checkpoint.
    run: config.json of the work directory.
    workdir: work directory, for the error.

  Raises:
    UserError: a key of section model or method, or the images, differ.
  """
  paths = {
      f"method.{path}"
      for part, declared in registry.METHODS[run.method.name].cls.frozen.items()
      for path in declared.paths(part)
  }
  changed = [
      f"{k} is {old!r} there, {new!r} in config.json"
      for k, (old, new) in difference(saved, run).items()
      if k.startswith(("model.", "method.", "data.image_shape"))
      and k not in paths
  ]
  if changed:
    raise errors.UserError(
      f"--workdir: got checkpoints of {workdir} of another config, expected "
      f"that of config.json; {', '.join(changed)}; restore config.json, or "
      "move the checkpoints of the other run away"
    )


def write(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes workdir/config.json atomically."""
  files.write_json(os.path.join(workdir, "config.json"), to_json(config))


def read_run(workdir: str) -> dict[str, Any] | None:
  """Returns config.json of a work directory, not resolved, or None.

  Raises:
    UserError: the file is damaged or of the first version of bcm_jax.
  """
  path = pathlib.Path(workdir) / "config.json"
  if not path.exists():
    return None
  try:
    raw = files.read_json(path)
    if not isinstance(raw, dict):
      raise ValueError("not an object")
    if not all(isinstance(v, dict | int) for v in raw.values()):
      raise ValueError("a section is not an object")
  except ValueError as e:
    raise _damaged(path, e) from e
  # Every config.json of the first version has this key.
  if "hang_secs" in _section(raw, "training"):
    raise errors.outdated(path)
  return raw


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  section = raw.get(name)
  return section if isinstance(section, Mapping) else {}


def _damaged(path: pathlib.Path, problem: Exception) -> errors.UserError:
  return errors.UserError(
    f"{path}: got a damaged file ({problem}), expected the config of a run; "
    "restore it from a backup, or move it away and train with --config=FILE, "
    "which is compared with the checkpoints and written there"
  )


def of_run(
  workdir: str, overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict | None:
  """Returns the config of the run in a work directory, or None."""
  raw = read_run(workdir)
  if raw is None:
    return None
  try:
    config = resolve(raw)
  except errors.UserError as e:
    raise _damaged(pathlib.Path(workdir) / "config.json", e) from e
  return resolve(raw, overrides) if overrides else config


def of_existing_run(
  workdir: str, overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
  """Returns the config of the run in a work directory.

  Args:
    workdir: work directory of the run.
    overrides: 'section.key' -> text.

  Raises:
    UserError: no run in workdir.
  """
  config = of_run(workdir, overrides)
  if config is None:
    raise errors.UserError(
      f"{workdir}: has no config.json, expected the work directory of a run; "
      "train or convert one"
    )
  return config


def load(
  file: str | None,
  overrides: Mapping[str, str],
  workdir: str | None = None,
) -> ml_collections.ConfigDict:
  """Returns the config of a command line: of the file, else of the run.

  Args:
    file: config file, or None.
    overrides: 'section.key' -> text.
    workdir: work directory of a run, or None.

  Raises:
    UserError: neither a file nor a run.
  """
  if file is not None:
    return resolve(read_file(file), overrides)
  run = None
  if workdir is not None:
    run = of_run(workdir, overrides)
  if run is None:
    names = ", ".join(p.name for p in shipped_configs())
    which = f" and no run in --workdir={workdir}" if workdir is not None else ""
    raise errors.UserError(
      f"--config: got None{which}, expected a config file; pass "
      f"--config=configs/NAME, one of {names}"
    )
  return run
