"""A run's network as a folder to give away, and such a folder as a run.

The form of the folder is interop.released's; release.hub is the command.
"""

from collections.abc import Iterator, Mapping
import functools
import json
import os
from typing import Any

from flax import traverse_util
import jax

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.export import model_folder
from bcm_jax.utils import files
from bcm_jax.utils import provenance

# A released network has one set of parameters and no averages beside it.
_ALONE = {
    "training.ema_rates": "()", "training.ema_stds": "()",
    "sample.average": "none", "eval.averages": "()",
}
# Keys that may name code, and what they become where they do: a folder from
# elsewhere must not choose what is imported.
_CODE = {"eval.features": "pixels", "method.gan_encoder": "teacher"}
_SHOWN = 3


def pack(
    workdir: str,
    out: str,
    average: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    license_id: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> str:
  """Writes the sampled network of a run as a folder; see interop.released.

  Args:
    workdir: of the run.
    out: folder to make; must not hold anything yet.
    average: which average, as sample.average; None is what section sample says.
    step: of the checkpoint; None is the newest.
    dtype: of the stored weights: 'float32', 'bfloat16' or 'float16'.
    license_id: the hub's name of a license, for the card.
    overrides: 'section.key' -> text, changes of the config that is written.

  Returns:
    What was written, for a terminal.

  Raises:
    UserError: no such run, checkpoint or average, or `out` is there already.
  """
  files.check_free(out)
  config = runs.config_of(workdir, overrides)
  experiment = build.build(config, to_train=False)
  step, average, params = runs.load_run(experiment, workdir, average, step)
  _check_shapes(workdir, experiment, params)
  result = _result(workdir, step, average)
  about = {
      "step": step, "average": average,
      "data": provenance.data_name(config.data),
      "image_shape": experiment.image_shape,
  }
  model_folder.write(
      out, resolve.to_json(config), params, about, dtype, result, license_id
  )
  count = sum(v.size for v in jax.tree.leaves(params))
  size = os.path.getsize(os.path.join(out, model_folder.WEIGHTS))
  lines = [
      f"step {step}, {average}: {count:,} parameters, {dtype}, {size:,} bytes",
      "no result of mode eval for these weights" if result is None
      else "with the result of mode eval",
      *_local_paths(config),
      f"written: {out}",
  ]
  return "\n".join(lines)


def unpack(
    folder: str, workdir: str, overrides: Mapping[str, str] | None = None
) -> str:
  """Makes a work directory of a folder, as bcm_jax.generate.convert does.

  Args:
    folder: that pack or pull made.
    workdir: to make; must not hold anything yet.
    overrides: 'section.key' -> text.

  Returns:
    What was made, for a terminal.

  Raises:
    UserError: as `load`, or something is there already.
  """
  files.check_free(workdir)
  experiment, params, metadata = load(folder, overrides)
  runs.write(
      workdir, experiment, params, metadata["step"], {"released": metadata}
  )
  return (
      f"step {metadata['step']}, {metadata['average']} of config "
      f"{metadata['config_digest']}, stored as {metadata['dtype']}\n"
      f"written: {workdir}"
  )


def load(
    folder: str, overrides: Mapping[str, str] | None = None
) -> tuple[build.Experiment, dict[str, Any], dict[str, Any]]:
  """A released network as objects.

  Args:
    folder: that pack or pull made.
    overrides: 'section.key' -> text, for the config.

  Returns:
    (experiment, parameters in float32, metadata as `released.read` gives it).
    The experiment's config names no averages, and no code of the folder's.

  Raises:
    UserError: as `released.read`; a config that this version does not know, or
      whose network has other tensors.
  """
  raw, params, metadata = model_folder.read(folder)
  model_folder.read_result(folder)
  path = os.path.join(folder, model_folder.CONFIG)
  try:
    config = resolve.resolve(_plain(raw), _ALONE | dict(overrides or {}))
    experiment = build.build(config, to_train=False)
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e
  _check_shapes(
      os.path.join(folder, model_folder.WEIGHTS), experiment, params
  )
  return experiment, params, metadata


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
  """A config in which no value names code."""
  config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
  for path, plain in _CODE.items():
    section, key = path.split(".")
    values = config.get(section)
    if isinstance(values, dict) and ":" in str(values.get(key)):
      values[key] = plain
  return config


def _check_shapes(place: str, experiment, params: Mapping[str, Any]) -> None:
  """Raises UserError where parameters are not those of the config's network."""
  method = experiment.method
  network = method.networks[method.sampled_network]
  shapes = jax.eval_shape(functools.partial(
      network.init, jax.random.key(0), *build.example_batch(experiment)
  ))
  wanted, found = (
      {name: tuple(v.shape) for name, v in
       traverse_util.flatten_dict(tree, sep=".").items()}
      for tree in (network.without_heads(shapes), params)
  )
  differing = [
      f"{name} is {found[name]} and should be {shape}"
      for name, shape in wanted.items() if found.get(name, shape) != shape
  ]
  parts = [
      f"{len(names)} {what}: {_first(names)}"
      for names, what in (
          (sorted(wanted.keys() - found.keys()), "missing"),
          (sorted(found.keys() - wanted.keys()), "unexpected"),
          (differing, "of another shape"),
      )
      if names
  ]
  if parts:
    raise errors.UserError(
        f"{place}: the tensors are not those of the config's network "
        f"({experiment.config.model.name!r}): {'; '.join(parts)}; use the "
        "config that they were trained with"
    )


def _first(names: list[str]) -> str:
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def _result(workdir: str, step: int, average: str) -> dict[str, Any] | None:
  """What mode eval wrote about a step and an average of a run, if it did."""
  for name in (f"{step}.json", f"{step}_{average}.json"):
    path = os.path.join(workdir, "eval", name)
    try:
      with open(path, encoding="utf-8") as file:
        result = json.load(file)
    except FileNotFoundError:
      continue
    except ValueError as e:
      raise errors.UserError(
          f"{path} is damaged ({e}); evaluate again, or remove it"
      ) from e
    if (result.get("step"), result.get("average")) == (step, average):
      return result
  return None


def _local_paths(config) -> Iterator[str]:
  """A line about values that tell of this machine's folders, if there are."""
  found = [
      f"{key}={text}"
      for key, value in resolve.flatten(resolve.to_json(config)).items()
      for text in (value if isinstance(value, list) else [value])
      if isinstance(text, str) and text.startswith(("/", "~"))
  ]
  if found:
    yield (
      f"{model_folder.CONFIG} names places of this machine: "
      f"{', '.join(found)}; "
      "set others by --config.section.key=value if they should not be seen"
    )
