"""Model folders: released networks in the layout of the Hugging Face Hub.

    model.safetensors  parameters of one network, named 'a.b.c' by tree path
    config.json        resolved config of the run
    result.json        result of mode eval for these parameters, if any
    README.md          model card

The header of the weights contains JSON under 'bcm_jax': format version, step,
average, data, image shape, and digests of config and tensors, which detect
corrupt or mismatched files. Nothing in a folder is executed. The command is
bcm_jax.release.hub.
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

FORMAT = 2
WEIGHTS, CONFIG = runs.RELEASED, "config.json"
RESULT, CARD = "result.json", "README.md"
# Files of a folder; the first two are required.
FILES = (WEIGHTS, CONFIG, RESULT, CARD)

# Storage dtypes; weights are read as float32.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Params = dict[str, Any]
_KEY = "bcm_jax"
# Types of the header fields except `format`.
_HEADER_TYPES = {
    "bcm_jax": str, "step": int, "average": str, "data": str,
    "image_shape": list, "dtype": str, "config_digest": str,
    "tensors_digest": str,
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# A model folder has one set of parameters and no averages.
_NO_AVERAGES = {
    "training.ema_rates": "()", "training.ema_stds": "()",
    "training.ema_halflife_kimg": "()",
    "sample.average": "none", "eval.averages": "()",
}
# Config keys that may name Python code to import, and safe replacements for
# downloaded folders.
_CODE_KEYS = {"eval.features": "pixels", "method.gan_encoder": "teacher"}
_MAX_JSON = 64 << 20  # Bytes.
_MAX_STEP = 2**31  # Steps are int32 in the train state.
_MAX_NAMES = 3  # Number of tensor names in an error.


def pack(
    workdir: str,
    out: str,
    average: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    license_id: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> str:
  """Writes the sampled network of a run as a model folder.

  Args:
    workdir: work directory of the run.
    out: folder to create; must be empty or absent.
    average: name of the moving average; None is `sample.average`.
    step: step of the checkpoint; None is the newest valid one.
    dtype: dtype of the stored weights: 'float32', 'bfloat16' or 'float16'.
    license_id: license identifier of the hub for the model card, or None.
    overrides: 'section.key' -> text, changes of the written config.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: the run, checkpoint or average does not exist, `out` exists, or
      as `write`.
  """
  files.check_free(out)
  _check_outside(workdir, out)
  config = resolve.of_existing_run(workdir, overrides)
  experiment = build.build(config, to_train=False)
  step, average, params = runs.load_run(experiment, workdir, average, step)
  result = _eval_result(workdir, step, average)
  metadata = {
      "step": step, "average": average,
      "data": provenance.data_name(config.data),
      "image_shape": experiment.image_shape,
  }
  write(
      out, resolve.to_json(config), params, metadata, dtype, result, license_id
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
  """Writes a model folder as a work directory.

  Args:
    folder: model folder, from pack or pull.
    workdir: directory to create; must be empty or absent.
    overrides: 'section.key' -> text, changes of the config.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: as `load`, or workdir exists.
  """
  files.check_free(workdir)
  _check_outside(folder, workdir)
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


def _check_outside(source: str, target: str) -> None:
  """Raises UserError if a target folder is inside its source."""
  inner, outer = os.path.realpath(target), os.path.realpath(source)
  if os.path.commonpath([inner, outer]) == outer:
    raise errors.UserError(
      f"{target}: got a folder inside {source}, expected one outside of it; "
      "choose another place"
    )


def load(
  folder: str, overrides: Mapping[str, str] | None = None
) -> tuple[build.Experiment, dict[str, Any], dict[str, Any]]:
  """Loads an experiment and its parameters from a model folder.

  Args:
    folder: model folder, from pack or pull.
    overrides: 'section.key' -> text, changes of the config.

  Returns:
    (experiment, float32 parameters, metadata as `read`). The config of the
    experiment has no averages and does not name code.

  Raises:
    UserError: as `read`; an invalid config, or tensors of another network.
  """
  raw, params, metadata = read(folder)
  read_result(folder)
  path = os.path.join(folder, CONFIG)
  try:
    config = resolve.resolve(_plain(raw), _NO_AVERAGES | dict(overrides or {}))
    experiment = build.build(config, to_train=False)
  except errors.UserError as e:
    raise errors.UserError(f"{path}: {e}") from e
  path = os.path.join(folder, WEIGHTS)
  _check_shapes(path, experiment, params)
  runs.check_finite(path, params)
  return experiment, params, metadata


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config after replacing values that name Python code."""
  config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
  for path, replacement in _CODE_KEYS.items():
    section, key = path.split(".")
    values = config.get(section)
    if isinstance(values, dict) and ":" in str(values.get(key)):
      values[key] = replacement
  return config


def _check_shapes(path: str, experiment, params: Mapping[str, Any]) -> None:
  """Raises UserError if the parameters do not fit the config's network."""
  method = experiment.method
  network = method.networks[method.sampled_network]
  shapes = jax.eval_shape(
    functools.partial(
      network.init, jax.random.key(0), *build.example_batch(experiment)
    )
  )
  expected, actual = (
    {
      name: tuple(v.shape)
      for name, v in traverse_util.flatten_dict(tree, sep=".").items()
    }
    for tree in (network.without_heads(shapes), params)
  )
  differing = [
    f"{name}: got {actual[name]}, expected {shape}"
    for name, shape in expected.items()
    if actual.get(name, shape) != shape
  ]
  parts = [
    f"{len(names)} {problem}: {_first(names)}"
    for names, problem in (
      (sorted(expected.keys() - actual.keys()), "missing"),
      (sorted(actual.keys() - expected.keys()), "unexpected"),
      (differing, "of another shape"),
    )
    if names
  ]
  if parts:
    raise errors.UserError(
      f"{path}: expected the tensors of the config's network "
      f"({experiment.config.model.name!r}), got {'; '.join(parts)}; use the "
      "config of their training"
    )


def _first(names: list[str]) -> str:
  """Joins the first names and counts the others."""
  others = len(names) - _MAX_NAMES
  more = f" and {others} more" if others > 0 else ""
  return ", ".join(names[:_MAX_NAMES]) + more


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
        f"{path}: got corrupt JSON ({e}); evaluate again, or remove it"
      ) from e
    if (result.get("step"), result.get("average")) == (step, average):
      return result
  return None


def _local_paths(config) -> Iterator[str]:
  """Yields a warning if config values are absolute local paths."""
  paths = [
    f"{key}={text}"
    for key, value in resolve.flatten(config).items()
    for text in (value if isinstance(value, list) else [value])
    if isinstance(text, str) and text.startswith(("/", "~"))
  ]
  if paths:
    yield (
      f"{CONFIG} contains paths of this machine: {', '.join(paths)}; change "
      "them by --config.section.key=value if they should not be published"
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
  """Writes a model folder atomically.

  Args:
    folder: folder to create; must be empty or absent.
    config: config of the run, from `resolve.to_json`.
    params: parameters of one network, nested dicts of arrays.
    about: 'step', 'average', 'data' (name of the dataset) and 'image_shape'
      (H, W, C).
    dtype: key of DTYPES; the 16-bit dtypes round.
    result: result of mode eval for this step and average, or None.
    license_id: license identifier of the hub for the model card, or None.

  Raises:
    UserError: the folder exists; an unknown dtype; overflow in this dtype; a
      result of other weights; an invalid license.
  """
  if dtype not in DTYPES:
    raise errors.unknown_name("dtype", dtype, DTYPES)
  if license_id is not None and not _LICENSE.fullmatch(license_id):
    raise errors.UserError(
      f"license: got {license_id!r}, expected an identifier of the hub such "
      "as apache-2.0 or mit"
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
  # A single entry, since safetensors writes several in random order.
  header = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
  count = sum(value.size for value in tensors.values())
  card = model_card.text(config, metadata, count, result, license_id)
  with files.new_folder(folder) as new:
    files.write_bytes(
      os.path.join(new, WEIGHTS),
      safetensors.numpy.save(tensors, {_KEY: header}),
    )
    files.write_json(os.path.join(new, CONFIG), config)
    if result is not None:
      files.write_json(os.path.join(new, RESULT), result)
    files.write_bytes(os.path.join(new, CARD), card.encode())


def read(
  folder: str, version: int = FORMAT
) -> tuple[dict[str, Any], Params, dict[str, Any]]:
  """Reads a model folder without building the config's network.

  Args:
    folder: written by pack or pull.
    version: expected format.

  Returns:
    config: content of config.json, not resolved.
    params: nested dicts of float32 arrays.
    metadata: 'format', 'bcm_jax' (version of the writer), 'step', 'average',
      'data', 'image_shape', 'dtype' as stored, 'config_digest' and
      'tensors_digest'.

  Raises:
    UserError: a missing or corrupt file, weights of another library or
      format, or a config of other weights.
  """
  _check_files(folder)
  path = os.path.join(folder, WEIGHTS)
  file = weight_files.read(path)
  metadata = _metadata(path, file, version)
  tensors = file.groups[""]
  _check_tensors(path, tensors, metadata)
  config = _read_json(os.path.join(folder, CONFIG))
  if hashing.json_digest(config)[:12] != metadata["config_digest"]:
    raise errors.UserError(
      f"{folder}: got {CONFIG} of digest {hashing.json_digest(config)[:12]}, "
      f"expected {metadata['config_digest']} as in {WEIGHTS}; pull or pack it "
      "again, and change values by --config.section.key=value"
    )
  flat = {name: value.astype(np.float32) for name, value in tensors.items()}
  return config, traverse_util.unflatten_dict(flat, sep="."), metadata


def read_result(folder: str) -> dict[str, Any] | None:
  """Returns the result of mode eval for the weights, or None.

  Raises:
    UserError: the file is corrupt.
  """
  path = os.path.join(folder, RESULT)
  return _read_json(path) if os.path.lexists(path) else None


def _tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of names, dtypes, shapes and values."""
  return hashing.arrays_digest(
    (f"{name}:{value.dtype.name}{list(value.shape)}:", value)
    for name, value in sorted(tensors.items())
  )


def _stored(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  """Casts a tensor to its storage dtype; UserError if it overflows."""
  with np.errstate(over="ignore"):
    stored = np.asarray(value, DTYPES[dtype], order="C")
  if np.any(np.isfinite(value) & ~np.isfinite(stored.astype(np.float32))):
    raise errors.UserError(
      f"tensor {name!r}: got values that overflow in {dtype}; use "
      "--dtype=bfloat16 or --dtype=float32"
    )
  return stored


def _check_result(result, metadata) -> None:
  """Raises UserError if the result is of another step or average."""
  for key in ("step", "average"):
    if result.get(key) != metadata[key]:
      raise errors.UserError(
        f"{key}: got {result.get(key)!r} in the result, expected "
        f"{metadata[key]!r} of the weights; evaluate these, or omit the result"
      )


def check_links(folder: str) -> None:
  """Raises UserError if a file of a model folder is a link or no file.

  For uploads: the content of a link may be any file of the machine.
  """
  for name in FILES:
    path = os.path.join(folder, name)
    is_file = os.path.isfile(path) and not os.path.islink(path)
    if os.path.lexists(path) and not is_file:
      raise errors.UserError(
        f"{path}: got a link or no regular file, expected a file of the "
        "folder; replace it by a copy"
      )


def _check_files(folder: str) -> None:
  """Raises UserError if a required file is missing."""
  missing = [
    name
    for name in (WEIGHTS, CONFIG)
    if not os.path.isfile(os.path.join(folder, name))
  ]
  if missing:
    raise errors.UserError(
      f"{folder}: got no {' and no '.join(missing)}, expected a folder of "
      "python -m bcm_jax.release.hub pack or pull"
    )


def _read_json(path: str) -> dict[str, Any]:
  """Reads a JSON object; UserError if the file is corrupt."""
  # Opening another kind of file, such as a pipe, may block.
  if not os.path.isfile(path) or os.path.getsize(path) > _MAX_JSON:
    raise _corrupt_file_error(path, "no regular file, or a huge one")
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (OSError, ValueError, RecursionError) as e:
    raise _corrupt_file_error(path, str(e)[:80]) from None
  if not isinstance(content, dict):
    raise _corrupt_file_error(path, f"{type(content).__name__}, not an object")
  return content


def _metadata(
  path: str, file: weight_files.WeightFile, expected: int
) -> dict[str, Any]:
  """Returns the checked header of the weights."""
  if file.kind != "safetensors" or _KEY not in file.metadata:
    raise errors.UserError(
      f"{path}: got weights of another library, expected those of "
      "bcm_jax.release.hub; convert them: python -m bcm_jax.interop.convert"
    )
  try:
    header = json.loads(file.metadata[_KEY])
    version = int(header["format"])
  except (ValueError, TypeError, KeyError, RecursionError):
    raise _corrupt_file_error(path, "an invalid header of bcm_jax") from None
  if version < expected:
    raise errors.outdated(path)
  if version > expected:
    raise errors.UserError(
      f"{path}: got format {version}, expected {expected}; update bcm_jax: "
      "pip install -U bcm_jax"
    )
  invalid = [
    k for k, kind in _HEADER_TYPES.items() if type(header.get(k)) is not kind
  ]
  if type(header.get("step")) is int and not 0 <= header["step"] < _MAX_STEP:
    invalid.append("step")
  if invalid or header["dtype"] not in DTYPES:
    fields = ", ".join(invalid or ["dtype"])
    raise _corrupt_file_error(path, f"a header without a valid {fields}")
  return header


def _check_tensors(path: str, tensors, metadata) -> None:
  """Raises UserError if dtypes, names or digest of the tensors are wrong."""
  dtype = DTYPES[metadata["dtype"]]
  for name, value in tensors.items():
    if value.dtype != dtype:
      raise _corrupt_file_error(
        path, f"tensor {name!r} of {value.dtype}, not {dtype}"
      )
    parts = name.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    if any(parent in tensors for parent in parents):
      raise _corrupt_file_error(path, f"tensor {name!r} below another tensor")
  if _tensors_digest(tensors) != metadata["tensors_digest"]:
    raise _corrupt_file_error(path, "values of another digest")


def _corrupt_file_error(path: str, problem: str) -> errors.UserError:
  """Returns the error for a corrupt file of a model folder."""
  return errors.UserError(
    f"{path}: corrupt file (got {problem}); pull or pack it again"
  )
