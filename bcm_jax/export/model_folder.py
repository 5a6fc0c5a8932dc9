"""A network to give away, as a folder: the form in which the hub holds it.

    model.safetensors  the parameters of one network, under 'a.b.c' of its tree
    config.json        the resolved config of its run
    result.json        what mode eval wrote about these parameters, if it did
    README.md          the model card

The weights' header holds what belongs to them, as JSON under 'bcm_jax': the
version of this format, step, average, data, shape of the images, and digests of
config and tensors, so that damage and mixed-up files are noticed. Nothing in a
folder is executed.
"""

from collections.abc import Mapping
import hashlib
import json
import os
import re
from typing import Any

from flax import traverse_util
import ml_dtypes
import numpy as np
import safetensors.numpy

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.export import model_card
from bcm_jax.interop import weight_files
from bcm_jax.utils import files

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
RESULT, CARD = "result.json", "README.md"
# All that a folder may hold; the first two must be there.
FILES = (WEIGHTS, CONFIG, RESULT, CARD)

# In which weights are stored; what is read is float32.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Params = dict[str, Any]
_KEY = "bcm_jax"
# What is known of weights, beside their format.
_KNOWN = {
    "bcm_jax": str, "step": int, "average": str, "data": str,
    "image_shape": list, "dtype": str, "config_digest": str,
    "tensors_digest": str,
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def is_released(folder: str) -> bool:
  """Whether a folder holds weights of this format."""
  return os.path.isfile(os.path.join(folder, WEIGHTS))


def write(
    folder: str,
    config: Mapping[str, Any],
    params: Params,
    about: Mapping[str, Any],
    dtype: str = "float32",
    result: Mapping[str, Any] | None = None,
    license_id: str | None = None,
) -> None:
  """Writes a folder, whole or not at all.

  Args:
    folder: must not hold anything yet.
    config: of the run, as `config.to_json` gives it.
    params: nested dicts of arrays, of one network.
    about: 'step', 'average' (whose values these are), 'data' (a name) and
      'image_shape' (height, width, channels).
    dtype: key of DTYPES; the smaller two round.
    result: what mode eval wrote about this step and average, or None.
    license_id: the hub's name of a license for the card, or None.

  Raises:
    UserError: something is there already; unknown dtype; a value that the dtype
      cannot hold; a result of other weights; a license that is no name.
  """
  if dtype not in DTYPES:
    raise errors.unknown_name("dtype", dtype, DTYPES)
  if license_id is not None and not _LICENSE.fullmatch(license_id):
    raise errors.UserError(
        f"license {license_id!r} is no name of the hub's list; give one such "
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
      "config_digest": config_digest(config),
      "tensors_digest": _tensors_digest(tensors),
  }
  if result is not None:
    _check_result(result, metadata)
  # One entry alone: safetensors writes several in an order that changes.
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
  """Reads a folder; whether its network is the config's is not asked here.

  Returns:
    config: as a run's config.json, not resolved.
    params: nested dicts of float32 arrays.
    metadata: 'format', 'bcm_jax' (version that wrote it), 'step', 'average',
      'data', 'image_shape', 'dtype' as stored, 'config_digest' and
      'tensors_digest'.

  Raises:
    UserError: a file that is missing, damaged, of another library or of a newer
      format, or a config that belongs to other weights.
  """
  _check_there(folder)
  path = os.path.join(folder, WEIGHTS)
  file = weight_files.read(path)
  metadata = _metadata(path, file)
  tensors = file.groups[""]
  _check_tensors(path, tensors, metadata)
  config = _read_json(os.path.join(folder, CONFIG))
  if config_digest(config) != metadata["config_digest"]:
    raise errors.UserError(
        f"{folder}: {CONFIG} is not the one that {WEIGHTS} was written with "
        f"(digest {config_digest(config)}, expected "
        f"{metadata['config_digest']}); pull or pack it again, and change "
        "values by --config.section.key=value"
    )
  flat = {name: value.astype(np.float32) for name, value in tensors.items()}
  return config, traverse_util.unflatten_dict(flat, sep="."), metadata


def read_result(folder: str) -> dict[str, Any] | None:
  """What mode eval wrote about a folder's weights; None if it is not there.

  Raises:
    UserError: the file is damaged.
  """
  path = os.path.join(folder, RESULT)
  return _read_json(path) if os.path.exists(path) else None


def config_digest(config: Mapping[str, Any]) -> str:
  """Twelve hex digits, those of `config.digest` of a resolved config."""
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of names, dtypes, shapes and values."""
  digest = hashlib.sha256()
  for name, value in sorted(tensors.items()):
    digest.update(f"{name}:{value.dtype.name}{list(value.shape)}:".encode())
    digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _stored(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    stored = np.asarray(value, DTYPES[dtype], order="C")
  if np.any(np.isfinite(value) & ~np.isfinite(stored.astype(np.float32))):
    raise errors.UserError(
        f"tensor {name!r} has values that {dtype} cannot hold; use "
        "--dtype=bfloat16 or --dtype=float32"
    )
  return stored


def _check_result(result, metadata) -> None:
  for key in ("step", "average"):
    if result.get(key) != metadata[key]:
      raise errors.UserError(
          f"the result is of {key} {result.get(key)!r}, the weights are of "
          f"{metadata[key]!r}; evaluate these, or leave the result out"
      )


def _check_there(folder: str) -> None:
  missing = [
      name for name in (WEIGHTS, CONFIG)
      if not os.path.isfile(os.path.join(folder, name))
  ]
  if missing:
    raise errors.UserError(
        f"{folder} holds no {' and no '.join(missing)}; expected a folder that "
        "python -m bcm_jax.release.hub pack or pull made"
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
  """What the header says of the weights."""
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
  """Raises UserError unless the tensors are as they were written."""
  dtype = DTYPES[metadata["dtype"]]
  for name, value in tensors.items():
    if value.dtype != dtype:
      raise _damaged(path, f"tensor {name!r} is {value.dtype}, not {dtype}")
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    if any(parent in tensors for parent in above):
      raise _damaged(path, f"tensor {name!r} lies below another")
  if _tensors_digest(tensors) != metadata["tensors_digest"]:
    raise _damaged(path, "its values do not fit their digest")


def _damaged(path: str, why: str) -> errors.UserError:
  return errors.UserError(
      f"{path} is damaged ({why}); pull or pack it again"
  )
