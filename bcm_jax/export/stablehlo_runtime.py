"""Loader of exported samplers; requires only jax and flatbuffers.

This file may be copied; every exported file also contains it as exported.py:

  PYTHONPATH=digits.zip python
  >>> import exported
  >>> model = exported.load("digits.zip")
  >>> images = model.sample(16, seed=0)
  >>> latents = model.invert(images, labels=0)
  >>> decoded = model.decode(latents, labels=0)

Image i of a seed is the image that mode sample of bcm_jax generates for this
seed and index; it does not depend on the batch.

Security: an exported file contains a program. Load only trusted files.
"""

from collections.abc import Sequence
import hashlib
import io
import json
import operator
from typing import Any
import zipfile
import zlib

import jax
from jax import export
import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.npz"
# Name of this file inside exported files: `import exported` with the file on
# PYTHONPATH.
LOADER = "exported.py"
# Seeds are uint32, indices of images int32.
MAX_SEED = 2**32 - 1
MAX_INDEX = 2**31 - 1
_ARGUMENTS = ("weights", "seed", "index", "labels", "images", "latents")
# Exceptions of zipfile, zlib, json and numpy for corrupt bytes.
_CORRUPT = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError,
    OSError, NotImplementedError, RuntimeError,
)


class ExportedError(ValueError):
  """Base class of errors: one line with problem, expectation and remedy."""


class DamagedError(ExportedError):
  """Error for a corrupt file."""


class PlatformError(ExportedError):
  """Error for a file without the platform of the devices."""


class VersionError(ExportedError):
  """Error for a file that requires another version of jax or of this module."""


class InputError(ExportedError):
  """Error for an argument that does not match the network."""


def load(path: str, batch_size: int = 256) -> "Model":
  """Loads an exported file and verifies its digests.

  Args:
    path: file written by `python -m bcm_jax.release.export`.
    batch_size: images per batch; larger requests run in several batches.

  Raises:
    OSError: the file cannot be opened.
    DamagedError: the file is corrupt.
    VersionError: this version of jax or of this module does not support it.
    PlatformError: it was not exported for the platform of the devices.
    InputError: batch_size is not positive.
  """
  if batch_size < 1:
    raise InputError(f"batch_size: got {batch_size}, expected at least 1")
  with open(path, "rb") as file:
    try:
      with zipfile.ZipFile(file) as members:
        manifest = json.loads(members.read(MANIFEST))
        _check_manifest(path, manifest)
        contents = {name: members.read(name) for name in manifest["files"]}
    except ExportedError:
      raise
    except _CORRUPT as e:
      raise _corrupt_file_error(path, f"{type(e).__name__}: {e}") from e
  for name, content in contents.items():
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
      raise _corrupt_file_error(path, f"another digest of {name}")
  weights = _read_weights(path, contents.pop(WEIGHTS))
  platform = export.default_export_platform()
  if platform not in manifest["platforms"]:
    raise PlatformError(
        f"{path}: got a file for {', '.join(manifest['platforms'])}, expected "
        f"{platform}, the platform of jax; export again with "
        f"--platforms={platform}, or set JAX_PLATFORMS to one of the file's"
    )
  return Model(manifest, contents, weights, batch_size)


def record_digest(manifest: dict[str, Any]) -> str:
  """Computes the SHA-256 of a manifest without its key 'sha256'."""
  record = {k: v for k, v in manifest.items() if k != "sha256"}
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _corrupt_file_error(path: str, problem: str) -> DamagedError:
  """Returns the error for a corrupt file."""
  return DamagedError(
      f"{path}: expected a whole exported file, got {problem}; copy or export"
      " it again"
  )


def _read_weights(path: str, content: bytes) -> dict[str, np.ndarray]:
  """Returns the arrays of weights.npz; DamagedError for other content."""
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
      weights = {name: file[name] for name in file.files}
  except (*_CORRUPT, AttributeError) as e:
    raise _corrupt_file_error(path, f"{WEIGHTS} with {e}") from e
  for name, value in weights.items():
    # bfloat16 is stored as raw bytes.
    if value.dtype.kind == "f" and not np.isfinite(value).all():
      raise _corrupt_file_error(path, f"values of {name} that are not finite")
  return weights


def _check_types(path: str, manifest: dict[str, Any]) -> None:
  """Raises DamagedError for an entry of another type than exports have."""

  def integers(value, count=None):
    return isinstance(value, list) and count in (None, len(value)) and all(
        type(n) is int and 0 < n < 2**31 for n in value
    )

  def texts(value):
    return isinstance(value, list) and all(type(v) is str for v in value)

  def function(entry):
    return (
        isinstance(entry, dict) and entry.get("file") in names
        and texts(entry.get("arguments"))
        and set(entry["arguments"]) <= set(_ARGUMENTS)
    )

  def is_optional(key):
    return key in manifest and (
        manifest[key] is None or function(manifest[key])
    )

  files, samplers = manifest.get("files"), manifest.get("samplers")
  names = [] if not isinstance(files, dict) else list(files)
  classes, shape = manifest.get("num_classes"), manifest.get("image_shape")
  versions = manifest.get("versions")
  wrong = [
      name for name, is_right in {
          "files": WEIGHTS in names and texts(list(files.values())),
          "platforms": texts(manifest.get("platforms"))
          and manifest["platforms"],
          "image_shape": integers(shape, 3),
          "num_classes": classes is None or integers([classes]),
          "samplers": isinstance(samplers, dict) and samplers
          and all(map(function, samplers.values())),
          "invert": is_optional("invert"),
          "decode": is_optional("decode"),
          "versions": isinstance(versions, dict)
          and type(versions.get("jax")) is str,
          "calling_convention_version":
          integers([manifest.get("calling_convention_version")]),
      }.items() if not is_right
  ]
  if wrong:
    raise _corrupt_file_error(path, f"{MANIFEST} with a wrong {wrong[0]}")


def _check_manifest(path: str, manifest: dict[str, Any]) -> None:
  """Raises an ExportedError for a corrupt manifest or another version."""
  if manifest["sha256"] != record_digest(manifest):
    raise _corrupt_file_error(path, f"another digest of {MANIFEST}")
  if manifest["format"] != FORMAT:
    raise VersionError(
        f"{path}: got format {manifest['format']}, expected {FORMAT}; use the "
        "exported.py inside this file"
    )
  _check_types(path, manifest)
  version = manifest["calling_convention_version"]
  low = export.minimum_supported_calling_convention_version
  high = export.maximum_supported_calling_convention_version
  if not low <= version <= high:
    raise VersionError(
        f"{path}: got calling convention {version} of jax "
        f"{manifest['versions']['jax']}, expected {low} to {high} for jax "
        f"{jax.__version__}; use a closer version of jax, or export again"
    )


class Model:
  """A sampler with weights, loaded from an exported file.

  Attributes:
    manifest: content of manifest.json.
    platforms: platforms of the export: 'cpu', 'cuda', 'rocm', 'tpu'.
    image_shape: (H, W, C).
    num_classes: number of classes, or None.
    samplers: name -> {'nfe': network evaluations, 'plan': steps as text,
      'steps': the same as dicts, levels in sigma units}; the first sampler is
      the default.
    inversion: the same entry for `invert`, or None if not exported.
  """

  def __init__(
      self,
      manifest: dict[str, Any],
      contents: dict[str, bytes],
      weights: dict[str, np.ndarray],
      batch_size: int,
  ):
    self.manifest = manifest
    self.platforms = tuple(manifest["platforms"])
    self.image_shape = tuple(manifest["image_shape"])
    self.num_classes = manifest["num_classes"]
    self.samplers = manifest["samplers"]
    self.inversion = manifest["invert"]
    self._batch_size = batch_size
    self._weights = jax.device_put(weights)
    self._contents = contents
    self._functions = {}

  def sample(
      self,
      n: int | Sequence[int],
      seed: int = 0,
      labels: int | Sequence[int] | None = None,
      sampler: str | None = None,
  ) -> np.ndarray:
    """Generates images.

    Args:
      n: number of images, or their indices [n].
      seed: 0 to MAX_SEED. Image i depends only on seed, i and its class.
      labels: one class, or classes [n]; None is i modulo the number of
        classes, as in mode sample.
      sampler: key of `samplers`; None is the first one.

    Returns:
      uint8 [n, H, W, C].

    Raises:
      InputError: an invalid argument.
    """
    names = list(self.samplers)
    sampler = names[0] if sampler is None else sampler
    if sampler not in names:
      raise InputError(
          f"sampler: got {sampler!r}, expected one of {', '.join(names)}"
      )
    index = _index(n)
    if labels is None and self.num_classes is not None:
      labels = index % self.num_classes
    rows = {"index": index} | self._labels(labels, len(index))
    return self._run(self.samplers[sampler], rows, seed)

  def invert(
      self,
      images: np.ndarray,
      labels: int | Sequence[int] | None = None,
      seed: int = 0,
  ) -> np.ndarray:
    """Inverts images to latents at noise level sigma_max.

    Args:
      images: uint8 [n, H, W, C].
      labels: one class, or classes [n]; None for networks without classes.
      seed: seed of the initial noise, which also depends on the index of an
        image in `images`.

    Returns:
      float32 [n, H, W, C], of standard deviation about sigma_max.

    Raises:
      InputError: an invalid argument, or exported without --invert.
    """
    entry = self._entry("invert")
    images = self._images(images, np.uint8, "images")
    rows = {"images": images, "index": _index(len(images))}
    return self._run(entry, rows | self._labels(labels, len(images)), seed)

  def decode(
      self, latents: np.ndarray, labels: int | Sequence[int] | None = None
  ) -> np.ndarray:
    """Generates images from latents in one step.

    Args:
      latents: float32 [n, H, W, C] at noise level sigma_max.
      labels: one class, or classes [n]; None for networks without classes.

    Returns:
      uint8 [n, H, W, C].

    Raises:
      InputError: an invalid argument, or exported without --invert.
    """
    entry = self._entry("decode")
    latents = self._images(latents, np.float32, "latents")
    rows = {"latents": latents} | self._labels(labels, len(latents))
    return self._run(entry, rows, 0)

  def _entry(self, name: str) -> dict[str, Any]:
    """Returns the manifest entry of 'invert' or 'decode'."""
    if self.manifest[name] is None:
      raise InputError(
          f"{name}: got a file without it; export again with --invert"
      )
    return self.manifest[name]

  def _images(self, images, dtype, name: str) -> np.ndarray:
    """Returns images as an array; InputError for another dtype or shape."""
    images = np.asarray(images)
    shape = ", ".join(map(str, self.image_shape))
    if images.dtype != dtype:
      raise InputError(
          f"{name}: got {images.dtype}, expected {np.dtype(dtype).name}"
          + ("; 0 is black, 255 white" if dtype == np.uint8 else "")
      )
    if images.shape[1:] != self.image_shape or not len(images):
      raise InputError(
          f"{name}: got shape {list(images.shape)}, expected [n, {shape}] with "
          "n at least 1; resize them, or add the missing axis"
      )
    return images

  def _labels(self, labels, n: int) -> dict[str, np.ndarray]:
    """Returns {'labels': int32 [n]}, or {} for networks without classes."""
    classes = self.num_classes
    if classes is None:
      if labels is not None:
        raise InputError(
            "labels: this network has no classes, expected None; omit them"
        )
      return {}
    if labels is None:
      raise InputError(
          f"labels: got None, expected classes from 0 to {classes - 1}"
      )
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape not in ((), (n,)):
      raise InputError(
          f"labels: got {labels.dtype} {list(labels.shape)}, expected one "
          f"integer or {n}"
      )
    if labels.min() < 0 or labels.max() >= classes:
      raise InputError(
          f"labels: got {labels.min()} to {labels.max()}, expected classes "
          f"from 0 to {classes - 1}"
      )
    return {"labels": np.broadcast_to(labels, (n,)).astype(np.int32)}

  def _run(
      self, entry: dict[str, Any], rows: dict[str, np.ndarray], seed: int
  ) -> np.ndarray:
    """Calls a function in batches of at most batch_size rows of the arrays."""
    function = self._function(entry["file"])
    fixed = {"weights": self._weights, "seed": _seed(seed)}
    n, results = len(next(iter(rows.values()))), []
    size = min(n, self._batch_size)
    for first in range(0, n, size):
      # Pads the last batch to the same size, which avoids a second compilation.
      index = np.minimum(np.arange(first, first + size), n - 1)
      values = fixed | {name: array[index] for name, array in rows.items()}
      try:
        result = function(*(values[name] for name in entry["arguments"]))
      except (KeyError, TypeError, ValueError) as e:
        raise DamagedError(
            f"{entry['file']}: expected a function of the network's arguments,"
            f" got {type(e).__name__}: {str(e)[:200]}; export it again"
        ) from e
      results.append(np.asarray(result)[: n - first])
    return np.concatenate(results)

  def _function(self, name: str):
    """Deserializes a function once."""
    if name not in self._functions:
      try:
        loaded = export.deserialize(bytearray(self._contents[name]))
      except ImportError:
        raise  # flatbuffers is missing; the message names it.
      # The digest was verified, so any other error is one of versions.
      except Exception as e:
        raise VersionError(
            f"jax: got {jax.__version__}, expected a version that can read "
            f"exports of jax {self.manifest['versions']['jax']} ({e}); use a "
            "closer version, or export again"
        ) from e
      self._functions[name] = jax.jit(loaded.call)
    return self._functions[name]


def _seed(seed: int) -> np.uint32:
  """Returns the seed as uint32; InputError if it is out of range."""
  if not 0 <= operator.index(seed) <= MAX_SEED:
    raise InputError(f"seed: got {seed}, expected 0 to {MAX_SEED}")
  return np.uint32(seed)


def _index(n: int | Sequence[int]) -> np.ndarray:
  """Returns the indices of images, int32 [n]: 0 .. n - 1, or the list n."""
  index = np.asarray(n)
  if index.dtype.kind in "iu" and index.ndim == 0:
    index = np.arange(index)
  if index.dtype.kind not in "iu" or index.ndim != 1 or not len(index):
    raise InputError(
        f"n: got {n!r}, expected a number of images of at least 1, or a list "
        "of indices"
    )
  if index.min() < 0 or index.max() > MAX_INDEX:
    raise InputError(
        f"n: got indices {index.min()} to {index.max()}, expected 0 to "
        f"{MAX_INDEX}"
    )
  return index.astype(np.int32)
