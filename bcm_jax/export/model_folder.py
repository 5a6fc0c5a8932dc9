"""A released network: a folder in the layout of the Hugging Face Hub.

    model.safetensors  the parameters of one network, under 'a.b.c' of its tree
    config.json        the resolved config of its run
    result.json        the result of mode eval for these parameters, if any
    README.md          the model card

The header of the weights is JSON under 'bcm_jax': format version, step,
average, data, image shape, and digests of config and tensors, so that corrupt
or mismatched files are detected. Nothing in a folder is executed. The command
is bcm_jax.export.hub.
"""

from collections.abc import Iterator, Mapping
import functools
import json
import os
import re
from typing import Any

from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.export import model_card
from bcm_jax.interop import weight_files
from bcm_jax.utils import files
from bcm_jax.utils import hashing
from bcm_jax.utils import provenance

FORMAT = 1
WEIGHTS, CONFIG = runs.RELEASED, "config.json"
RESULT, CARD = "result.json", "README.md"
# The files of a folder; the first two are required.
FILES = (WEIGHTS, CONFIG, RESULT, CARD)

# Storage dtypes; weights are read as float32.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Params = dict[str, Any]
_KEY = "bcm_jax"
# Fields of the header, in addition to the format.
_KNOWN = {
    "bcm_jax": str, "step": int, "average": str, "data": str,
    "image_shape": list, "dtype": str, "config_digest": str,
    "tensors_digest": str,
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# A released network has one set of parameters and no averages.
_NO_AVERAGES = {
    "training.ema_rates": "()", "training.ema_stds": "()",
    "sample.average": "none", "eval.averages": "()",
}
# Keys that may name code, and their replacements: a downloaded folder must not
# choose what is imported.
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
  """Writes the sampled network of a run as a folder.

  Args:
    workdir: of the run.
    out: folder to create; must be empty or absent.
    average: which average, as sample.average; None is `sample.average`.
    step: of the checkpoint; None is the newest.
    dtype: of the stored weights: 'float32', 'bfloat16' or 'float16'.
    license_id: identifier of a license on the hub, for the card.
    overrides: 'section.key' -> text, changes of the config that is written.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: no such run, checkpoint or average, or `out` exists.
  """
  files.check_free(out)
  config = resolve.of_existing_run(workdir, overrides)
  experiment = build.build(config, to_train=False)
  step, average, params = runs.load_run(experiment, workdir, average, step)
  _check_shapes(workdir, experiment, params)
  result = _eval_result(workdir, step, average)
  about = {
      "step": step, "average": average,
      "data": provenance.data_name(config.data),
      "image_shape": experiment.image_shape,
  }
  write(
      out, resolve.to_json(config), params, about, dtype, result, license_id
  )
  count = sum(v.size for v in jax.tree.leaves(params))
  size = os.path.getsize(os.path.join(out, WEIGHTS))
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
  """Writes a folder as a work directory, as bcm_jax.generate.convert does.

  Args:
    folder: written by pack or pull.
    workdir: to create; must be empty or absent.
    overrides: 'section.key' -> text.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: as `load`, or workdir exists.
  """
  files.check_free(workdir)
  experiment, params, metadata = load(folder, overrides)
  runs.write(
    workdir,
    resolve.to_json(experiment.config),
    experiment.method.sampled_network,
    params,
    metadata["step"],
    {"released": metadata},
  )
  return (
    f"step {metadata['step']}, {metadata['average']} of config "
    f"{metadata['config_digest']}, stored as {metadata['dtype']}\n"
    f"written: {workdir}"
  )


def load(
  folder: str, overrides: Mapping[str, str] | None = None
) -> tuple[build.Experiment, dict[str, Any], dict[str, Any]]:
  """Loads a folder as an experiment with parameters.

  Args:
    folder: written by pack or pull.
    overrides: 'section.key' -> text, for the config.

  Returns:
    (experiment, parameters in float32, metadata as `read`). The config of the
    experiment has no averages and does not name code.

  Raises:
    UserError: as `read`; an unknown config, or one whose network has other
      tensors.
  """
  raw, params, metadata = read(folder)
  read_result(folder)
  path = os.path.join(folder, CONFIG)
  try:
    config = resolve.resolve(_plain(raw), _NO_AVERAGES | dict(overrides or {}))
    experiment = build.build(config, to_train=False)
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e
  _check_shapes(os.path.join(folder, WEIGHTS), experiment, params)
  return experiment, params, metadata


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config with values that name code replaced."""
  config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
  for path, plain in _CODE.items():
    section, key = path.split(".")
    values = config.get(section)
    if isinstance(values, dict) and ":" in str(values.get(key)):
      values[key] = plain
  return config


def _check_shapes(place: str, experiment, params: Mapping[str, Any]) -> None:
  """Raises UserError if the parameters do not fit the config's network."""
  method = experiment.method
  network = method.networks[method.sampled_network]
  shapes = jax.eval_shape(
    functools.partial(
      network.init, jax.random.key(0), *build.example_batch(experiment)
    )
  )
  expected, found = (
    {
      name: tuple(v.shape)
      for name, v in traverse_util.flatten_dict(tree, sep=".").items()
    }
    for tree in (network.without_heads(shapes), params)
  )
  differing = [
    f"{name} is {found[name]} and should be {shape}"
    for name, shape in expected.items()
    if found.get(name, shape) != shape
  ]
  parts = [
    f"{len(names)} {what}: {_first(names)}"
    for names, what in (
      (sorted(expected.keys() - found.keys()), "missing"),
      (sorted(found.keys() - expected.keys()), "unexpected"),
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


def _eval_result(
  workdir: str, step: int, average: str
) -> dict[str, Any] | None:
  """Returns the result of mode eval for a step and an average, or None."""
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
  """Yields a warning about config values that are absolute local paths."""
  found = [
    f"{key}={text}"
    for key, value in resolve.flatten(config).items()
    for text in (value if isinstance(value, list) else [value])
    if isinstance(text, str) and text.startswith(("/", "~"))
  ]
  if found:
    yield (
      f"{CONFIG} contains paths of this machine: {', '.join(found)}; set "
      "others by --config.section.key=value if they should not be published"
    )


def write(
  folder: str,
  config: Mapping[str, Any],
  params: Params,
  about: Mapping[str, Any],
  dtype: str = "float32",
  result: Mapping[str, Any] | None = None,
  license_id: str | None = None,
) -> None:
  """Writes a folder atomically.

  Args:
    folder: must be empty or absent.
    config: of the run, as `resolve.to_json` returns it.
    params: nested dicts of arrays, of one network.
    about: 'step', 'average', 'data' (a name) and 'image_shape' (height, width,
      channels).
    dtype: key of DTYPES; the smaller two round.
    result: of mode eval for this step and average, or None.
    license_id: identifier of a license on the hub for the card, or None.

  Raises:
    UserError: the folder exists; unknown dtype; overflow in that dtype; a
      result of other weights; an invalid license.
  """
  if dtype not in DTYPES:
    raise errors.unknown_name("dtype", dtype, DTYPES)
  if license_id is not None and not _LICENSE.fullmatch(license_id):
    raise errors.UserError(
      f"license: got {license_id!r}, expected an identifier of the hub's "
      f"list "
      "such as apache-2.0 or mit"
    )
  tensors = {
    name: _stored(name, np.asarray(value), dtype)
    for name, value in traverse_util.flatten_dict(params, sep=".").items()
  }
  metadata = {
    "bcm_jax": __version__,
    **about,
    "image_shape": list(about["image_shape"]),
    "dtype": dtype,
    "config_digest": hashing.json_digest(config)[:12],
    "tensors_digest": _tensors_digest(tensors),
  }
  if result is not None:
    _check_result(result, metadata)
  # One entry: safetensors writes several in random order.
  header = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
  count = sum(value.size for value in tensors.values())
  card = model_card.text(config, metadata, count, result, license_id)
  with files.new_folder(folder) as made:
    files.write_bytes(
      os.path.join(made, WEIGHTS),
      safetensors.numpy.save(tensors, {_KEY: header}),
    )
    files.write_json(os.path.join(made, CONFIG), config)
    if result is not None:
      files.write_json(os.path.join(made, RESULT), result)
    files.write_bytes(os.path.join(made, CARD), card.encode())


def read(folder: str) -> tuple[dict[str, Any], Params, dict[str, Any]]:
  """Reads a folder without comparing the tensors with the config's network.

  Returns:
    config: as a run's config.json, not resolved.
    params: nested dicts of float32 arrays.
    metadata: 'format', 'bcm_jax' (version that wrote it), 'step', 'average',
      'data', 'image_shape', 'dtype' as stored, 'config_digest' and
      'tensors_digest'.

  Raises:
    UserError: a missing or damaged file, one of another library or of a newer
      format, or a config of other weights.
  """
  _check_there(folder)
  path = os.path.join(folder, WEIGHTS)
  file = weight_files.read(path)
  metadata = _metadata(path, file)
  tensors = file.groups[""]
  _check_tensors(path, tensors, metadata)
  config = _read_json(os.path.join(folder, CONFIG))
  if hashing.json_digest(config)[:12] != metadata["config_digest"]:
    raise errors.UserError(
      f"{folder}: {CONFIG} is not the one that {WEIGHTS} was written with "
      f"(digest {hashing.json_digest(config)[:12]}, expected "
      f"{metadata['config_digest']}); pull or pack it again, and change "
      "values by --config.section.key=value"
    )
  flat = {name: value.astype(np.float32) for name, value in tensors.items()}
  return config, traverse_util.unflatten_dict(flat, sep="."), metadata


def read_result(folder: str) -> dict[str, Any] | None:
  """Returns the result of mode eval for the weights, or None.

  Raises:
    UserError: the file is damaged.
  """
  path = os.path.join(folder, RESULT)
  return _read_json(path) if os.path.exists(path) else None


def _tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of names, dtypes, shapes and values."""
  return hashing.arrays_digest(
    (f"{name}:{value.dtype.name}{list(value.shape)}:", value)
    for name, value in sorted(tensors.items())
  )


def _stored(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    stored = np.asarray(value, DTYPES[dtype], order="C")
  if np.any(np.isfinite(value) & ~np.isfinite(stored.astype(np.float32))):
    raise errors.UserError(
      f"tensor {name!r} overflows in {dtype}; use "
      "--dtype=bfloat16 or --dtype=float32"
    )
  return stored


def _check_result(result, metadata) -> None:
  for key in ("step", "average"):
    if result.get(key) != metadata[key]:
      raise errors.UserError(
        f"the result is of {key} {result.get(key)!r}, the weights are of "
        f"{metadata[key]!r}; evaluate these, or omit the result"
      )


def _check_there(folder: str) -> None:
  missing = [
    name
    for name in (WEIGHTS, CONFIG)
    if not os.path.isfile(os.path.join(folder, name))
  ]
  if missing:
    raise errors.UserError(
      f"{folder} holds no {' and no '.join(missing)}; expected a folder "
      f"written "
      "by python -m bcm_jax.release.hub pack or pull"
    )


def _read_json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(
      f"{path} is damaged ({str(e)[:80]}); pull or pack it again"
    ) from None
  if not isinstance(content, dict):
    raise errors.UserError(
      f"{path} is damaged (no JSON object); pull or pack it again"
    )
  return content


def _metadata(path: str, file: weight_files.WeightFile) -> dict[str, Any]:
  """Returns the checked header of the weights."""
  if file.kind != "safetensors" or _KEY not in file.metadata:
    raise errors.UserError(
      f"{path} was not written by bcm_jax.export.hub; weights of other "
      "libraries become a work directory by python -m bcm_jax.interop.convert"
    )
  try:
    found = json.loads(file.metadata[_KEY])
    version = int(found["format"])
  except (ValueError, TypeError, KeyError, RecursionError):
    raise _damaged(path, "its header is no record of bcm_jax") from None
  if version > FORMAT:
    raise errors.UserError(
      f"{path} has format {version}, this bcm_jax reads formats up to "
      f"{FORMAT}; update it: pip install -U bcm_jax"
    )
  wrong = [k for k, kind in _KNOWN.items() if type(found.get(k)) is not kind]
  if wrong or found["dtype"] not in DTYPES:
    raise _damaged(path, f"its header lacks {', '.join(wrong or ['a dtype'])}")
  return found


def _check_tensors(path: str, tensors, metadata) -> None:
  """Raises UserError if dtypes, names or digest of the tensors are wrong."""
  dtype = DTYPES[metadata["dtype"]]
  for name, value in tensors.items():
    if value.dtype != dtype:
      raise _damaged(path, f"tensor {name!r} is {value.dtype}, not {dtype}")
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    if any(parent in tensors for parent in above):
      raise _damaged(path, f"tensor {name!r} is below another")
  if _tensors_digest(tensors) != metadata["tensors_digest"]:
    raise _damaged(path, "its values do not match their digest")


def _damaged(path: str, why: str) -> errors.UserError:
  return errors.UserError(f"{path} is damaged ({why}); pull or pack it again")
