"""Rewrites a run or model folder of the first version in today's format.

  bcm_jax migrate OLD NEW

OLD is a work directory, a model folder (model.safetensors and config.json) or a
folder of result files of mode eval, on a local disk; it is not changed. NEW is
created atomically. Tensors, step numbers and digests of data and of frozen
networks stay the same; keys are renamed by the tables below (docs/renames.md),
and digests of what contains them are computed again.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
import shutil
from typing import Any

from etils import epath
from flax import traverse_util

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import digests
from bcm_jax.checkpoint import runs
from bcm_jax.checkpoint import workdir_lock
from bcm_jax.config import renamed
from bcm_jax.export import model_folder
from bcm_jax.training import metric_writers
from bcm_jax.training import nonfinite
from bcm_jax.training import train_state
from bcm_jax.utils import cli
from bcm_jax.utils import files

# Format of checkpoints and model folders that this command reads.
FORMAT = 1

_RESULT = {
    "recognised": "class_accuracy",
    "recognised_worst_class": "worst_class_accuracy",
    "judge_test_accuracy": "classifier_test_accuracy",
    "psnr_of_mean_mse": "psnr",
    "compared_one_by_one": "num_real_for_prdc",
    "neighbours_k": "neighbors_k",
    "ratio": "memorization_ratio",
}
_STATE = {"players": "networks", "window": "data_offset"}
# An average, or the name of its result file without the suffix.
_POWER = re.compile(r"(\d+_)?power_(\d+(?:\.\d+)?(?:e-?\d+)?)")
# Folders that are copied as they are.
_AS_IS = ("tensorboard", "goodput", "damaged", nonfinite.FOLDER)


def migrate(old: str, new: str) -> str:
  """Writes NEW from OLD.

  Args:
    old: work directory, model folder or folder of result files.
    new: folder to create; must be empty or absent.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: OLD is none of these, damaged, or not of the first version; NEW
      exists or is in OLD.
  """
  files.check_free(new)
  if pathlib.Path(new).resolve().is_relative_to(pathlib.Path(old).resolve()):
    raise errors.UserError(
        f"NEW: got {new}, expected a folder outside OLD, which is not changed"
    )
  if not any(pathlib.Path(old).glob("*.json")):
    raise errors.UserError(
        f"{old}: has no .json files, expected a work directory, a model folder "
        "or a folder of result files"
    )
  with files.new_folder(new) as folder:
    if runs.is_released(old):
      _write_model_folder(old, folder)
      done, steps = model_folder.FILES, []
    else:
      steps = _write_checkpoints(old, folder)
      # The lock belongs to the process that wrote OLD.
      done = (
          "checkpoints", workdir_lock.FOLDER, workdir_lock.LEGACY_FILE
      )
    shutil.copytree(
        old, folder, dirs_exist_ok=True,
        ignore=lambda at, names: _left_out(at, names, old, done),
        copy_function=lambda source, target: _copy_file(source, target, old),
    )
  found = f"checkpoints: {', '.join(map(str, steps))}\n" if steps else ""
  return f"{found}written: {new}"


def config(old: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a resolved config of the first version with today's keys."""
  new = {
      renamed.SECTIONS.get(section, section): _rename(
          values, renamed.KEYS.get(section, {})
      )
      for section, values in old.items()
  }
  if new["method"].get("dm_weight") == "normalised":
    new["method"]["dm_weight"] = "normalized"
  # Patterns of paths in the state.
  new["parallel"]["sharding"] = [
      rule.replace("players/", "networks/")
      for rule in new["parallel"]["sharding"]
  ]
  return json.loads(json.dumps(new, sort_keys=True))


def _config_of(old: Any, path: object) -> dict[str, Any]:
  """Returns `config(old)`, checked.

  Args:
    old: JSON content of a config.
    path: its file or checkpoint, for errors.

  Raises:
    UserError: no config, or not one of the first version.
  """
  sections = old if isinstance(old, Mapping) else {}
  training, parallel = (
      sections.get(name) for name in ("training", "parallel")
  )
  if isinstance(training, Mapping) and "hang_secs" not in training:
    raise errors.UserError(
        f"{path}: got a config of this version, expected one of the first "
        "version; nothing has to be migrated"
    )
  try:
    rules = parallel["sharding"]
    valid = all(
        isinstance(v, Mapping) for k, v in sections.items() if k != "seed"
    ) and all(isinstance(rule, str) for rule in rules)
    valid = valid and {"training", "method"} <= sections.keys()
  except (TypeError, KeyError):
    valid = False
  if not valid:
    raise errors.UserError(
        f"{path}: got damaged content, expected the config of a run; restore "
        "it from a backup"
    )
  return config(sections)


def _rename(tree: Any, table: Mapping[str, str]) -> Any:
  """Renames keys of JSON content, and averages among its values."""
  if isinstance(tree, dict):
    return {table.get(k, k): _rename(v, table) for k, v in tree.items()}
  if isinstance(tree, list):
    return [_rename(v, table) for v in tree]
  return _average(tree) if isinstance(tree, str) else tree


def _average(name: str) -> str:
  """Returns today's name of a power function average; other names as is."""
  match = _POWER.fullmatch(name)
  if match is None:
    return name
  step, std = match.groups(default="")
  return step + train_state.phema_name(float(std))


def _path(old: digests.Path) -> digests.Path:
  """Returns today's path of a leaf of a checkpoint."""
  top, *rest = old
  if top == "players":  # (top, name, 'params' or 'opt_state' or 'updates', ...)
    rest = ["num_updates" if k == "updates" and i == 1 else k
            for i, k in enumerate(rest)]
  elif top == "averages" and rest:
    rest[0] = _average(rest[0])
  return (_STATE.get(top, top), *rest)


def _write_checkpoints(old: str, new: str) -> list[int]:
  """Writes the checkpoints of a run, one at a time; returns their steps."""
  source = checkpoint.Checkpoints(runs.checkpoint_dir(old))
  steps = source.all_steps()
  with checkpoint.Checkpoints(runs.checkpoint_dir(new), keep=None) as target:
    for step in steps:
      folder = epath.Path(source.directory) / str(step)
      try:
        loaded = checkpoint.read_step(folder, FORMAT)
      except digests.Damage as e:
        raise errors.UserError(
            f"{folder} is damaged ({e}); move it to {old}/damaged and run "
            "again"
        ) from e
      leaves = {_path(path): leaf for path, leaf in loaded.leaves.items()}
      meta = loaded.meta | {
          "config": _config_of(loaded.meta.get("config"), folder)
      }
      target.save(step, traverse_util.unflatten_dict(leaves), meta)
      target.wait()
  return steps


def _write_model_folder(old: str, new: str) -> None:
  """Writes the files of a model folder, its card again."""
  raw, params, metadata = model_folder.read(old, FORMAT)
  result = model_folder.read_result(old)
  about = {k: metadata[k] for k in ("step", "data", "image_shape")}
  about["average"] = _average(metadata["average"])
  card = pathlib.Path(old, model_folder.CARD)
  license_id = re.search(
      r'^license: "(.*)"$', card.read_text() if card.exists() else "", re.M
  )
  model_folder.write(
      new, _config_of(raw, old), params, about, metadata["dtype"],
      None if result is None else _rename(result, _RESULT),
      license_id and license_id.group(1),
  )


def _left_out(at: str, names: list[str], old: str, done) -> Sequence[str]:
  """Returns the names in OLD that are written otherwise.

  Raises:
    UserError: a dangling link, or one to a folder that contains it.
  """
  here = pathlib.Path(os.path.realpath(at))
  for path in (os.path.join(at, name) for name in names):
    if os.path.islink(path) and (
        not os.path.exists(path) or here.is_relative_to(os.path.realpath(path))
    ):
      raise errors.UserError(
          f"{path}: got a link to nothing or to a folder that contains it, "
          "expected none; remove it"
      )
  return done if at == old else ()


def _copy_file(source: str, target: str, old: str) -> None:
  """Copies a file of OLD.

  Raises:
    UserError, MachineError: it cannot be copied; shutil.copytree collects only
      the texts of OSError.
  """
  try:
    if not os.path.isfile(source):
      raise errors.UserError(
          f"{source}: got a pipe or a socket, expected a file; remove it"
      )
    _copy(
        pathlib.Path(source), pathlib.Path(target),
        os.path.relpath(source, old).split(os.sep)[0],
    )
  except OSError as e:
    raise errors.of_file(e) or e from e


def _copy(old: pathlib.Path, new: pathlib.Path, top: str) -> None:
  """Copies a file with its keys renamed; `top` is the first part of its path.
  """
  if top == metric_writers.METRICS_FILE:
    with open(old, "rb") as source, open(new, "wb") as target:
      target.writelines(
          line.replace(b'loss_soft"', b'loss_st"') for line in source
      )
  elif old.suffix == ".json" and top not in _AS_IS:
    try:
      content = files.read_json(old)
    except ValueError as e:
      raise errors.UserError(
          f"{old} is damaged ({e}); repair or remove it"
      ) from e
    if top == model_folder.CONFIG:
      content = _config_of(content, old)
    else:
      table = _STATE if top == nonfinite.ROLLBACKS else _RESULT
      content = _rename(content, table)
    files.write_json(new.with_stem(_average(new.stem)), content)
  else:
    shutil.copy2(old, new)


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  parser = cli.Parser("migrate", __doc__)
  parser.add_argument("old", metavar="OLD", help="folder to read")
  parser.add_argument("new", metavar="NEW", help="folder to create")
  with cli.reporting():
    flags = parser.parse_args(argv)
    print(migrate(flags.old, flags.new))


if __name__ == "__main__":
  main()
