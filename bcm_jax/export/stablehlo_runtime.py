"""Exported samplers without bcm_jax: needs only jax and flatbuffers.

Copy this file wherever it is needed; every exported file also holds it:

  PYTHONPATH=digits.zip python
  >>> import exported
  >>> model = exported.load("digits.zip")
  >>> images = model.sample(16, seed=0)
  >>> latents = model.invert(images, labels=0)
  >>> again = model.decode(latents, labels=0)

Image i of a seed is the one that bcm_jax's mode sample draws under these two
numbers, however many are asked for at a time.

An exported file holds a program: load only those whose origin you trust.
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
# Seeds are uint32, numbers of images int32.
MAX_SEED = 2**32 - 1
MAX_INDEX = 2**31 - 1
# How zipfile, zlib, json and numpy say that bytes are not what they were.
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError,
    OSError, NotImplementedError, RuntimeError,
)


class ExportedError(ValueError):
  """What was wrong, what was expected and what to do, in one line."""


class DamagedError(ExportedError):
  """The file is not as it was written."""


class PlatformError(ExportedError):
  """It was not exported for the devices here."""


class VersionError(ExportedError):
  """Another version of jax, or of this file, is needed."""


class InputError(ExportedError):
  """An argument does not fit the network."""


def load(path: str, batch_size: int = 256) -> "Model":
  """Reads an exported file and checks every part of it.

  Args:
    path: what `python -m bcm_jax.release.export` wrote.
    batch_size: images at a time; requests for more are cut into such parts.

  Raises:
    OSError: the file cannot be opened.
    DamagedError, VersionError, PlatformError: it cannot be used here.
    InputError: batch_size is not positive.
  """
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size} must be at least 1")
  with open(path, "rb") as file:
    try:
      with zipfile.ZipFile(file) as members:
        manifest = json.loads(members.read(MANIFEST))
        _check_manifest(path, manifest)
        contents = {name: members.read(name) for name in manifest["files"]}
    except ExportedError:
      raise
    except _UNREADABLE as e:
      raise _damaged(path, f"{type(e).__name__}: {e}") from e
  for name, content in contents.items():
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
      raise _damaged(path, f"digest of {name}")
  platform = export.default_export_platform()
  if platform not in manifest["platforms"]:
    raise PlatformError(
        f"{path} was exported for {', '.join(manifest['platforms'])}, and jax "
        f"runs on {platform} here; export again with --platforms={platform}, "
        "or set JAX_PLATFORMS to one of those"
    )
  return Model(manifest, contents, batch_size)


def record_digest(manifest: dict[str, Any]) -> str:
  """Returns the SHA-256 of a manifest without its key 'sha256'."""
  rest = {k: v for k, v in manifest.items() if k != "sha256"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(path: str, what: str) -> DamagedError:
  return DamagedError(
      f"{path} is damaged or no exported file ({what}); copy or export it again"
  )


def _check_manifest(path: str, manifest: dict[str, Any]) -> None:
  if manifest["sha256"] != record_digest(manifest):
    raise _damaged(path, f"digest of {MANIFEST}")
  if manifest["format"] != FORMAT:
    raise VersionError(
        f"{path} has format {manifest['format']}, and this exported.py reads "
        f"{FORMAT}; take the exported.py inside that file"
    )
  version = manifest["calling_convention_version"]
  low = export.minimum_supported_calling_convention_version
  high = export.maximum_supported_calling_convention_version
  if not low <= version <= high:
    raise VersionError(
        f"{path} was exported by jax {manifest['versions']['jax']} (calling "
        f"convention {version}), and jax {jax.__version__} runs {low} to "
        f"{high}; use a jax nearer to that one, or export again"
    )


class Model:
  """The functions of an exported file.

  Attributes:
    manifest: all that the file says of itself.
    platforms: what it was exported for: 'cpu', 'cuda', 'rocm', 'tpu'.
    image_shape: (H, W, C).
    num_classes: classes that images are conditioned on, or None.
    samplers: name -> {'nfe': evaluations of the network, 'plan': what the
      sampler does, for a person, 'steps': the same as data, levels in sigma};
      the first one is the default.
    inversion: the same of `invert`; None where it was not exported.
  """

  def __init__(
      self,
      manifest: dict[str, Any],
      contents: dict[str, bytes],
      batch_size: int,
  ):
    self.manifest = manifest
    self.platforms = tuple(manifest["platforms"])
    self.image_shape = tuple(manifest["image_shape"])
    self.num_classes = manifest["num_classes"]
    self.samplers = manifest["samplers"]
    self.inversion = manifest["invert"]
    self._batch_size = batch_size
    with np.load(io.BytesIO(contents.pop(WEIGHTS))) as file:
      self._weights = jax.device_put({name: file[name] for name in file.files})
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
      n: how many, the first ones of the seed; or the numbers of those wanted.
      seed: 0 to MAX_SEED. Image i depends only on seed, i and its class.
      labels: class of all, or [n] of each; None is i modulo the number of
        classes, as in mode sample.
      sampler: one of `samplers`.

    Returns:
      uint8 [n, H, W, C].

    Raises:
      InputError: an argument that does not fit.
    """
    names = list(self.samplers)
    sampler = names[0] if sampler is None else sampler
    if sampler not in names:
      raise InputError(
          f"sampler {sampler!r} was not exported; there is {', '.join(names)}"
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
    """Maps images to the latents that `decode` maps back.

    Args:
      images: uint8 [n, H, W, C].
      labels: class of all, or [n] of each; None for networks without classes.
      seed: of the small noise that is added first; place in `images` counts.

    Returns:
      float32 [n, H, W, C], of standard deviation about sigma_max.

    Raises:
      InputError: an argument that does not fit, or --invert was not given.
    """
    entry = self._inverting("invert")
    images = self._images(images, np.uint8, "images")
    rows = {"images": images, "index": _index(len(images))}
    return self._run(entry, rows | self._labels(labels, len(images)), seed)

  def decode(
      self, latents: np.ndarray, labels: int | Sequence[int] | None = None
  ) -> np.ndarray:
    """Maps latents, float32 [n, H, W, C], to uint8 images in one step.

    labels and errors are those of `invert`.
    """
    entry = self._inverting("decode")
    latents = self._images(latents, np.float32, "latents")
    rows = {"latents": latents} | self._labels(labels, len(latents))
    return self._run(entry, rows, 0)

  def _inverting(self, name: str) -> dict[str, Any]:
    if self.manifest[name] is None:
      raise InputError(f"{name} was not exported; export again with --invert")
    return self.manifest[name]

  def _images(self, images, dtype, what: str) -> np.ndarray:
    images = np.asarray(images)
    shape = ", ".join(map(str, self.image_shape))
    if images.dtype != dtype:
      raise InputError(
          f"{what} are {images.dtype}, expected {np.dtype(dtype).name}"
          + ("; 0 is black, 255 white" if dtype == np.uint8 else "")
      )
    if images.shape[1:] != self.image_shape or not len(images):
      raise InputError(
          f"{what} are {list(images.shape)}, expected [n, {shape}] with n at "
          "least 1; resize them, or add the missing axis"
      )
    return images

  def _labels(self, labels, n: int) -> dict[str, np.ndarray]:
    classes = self.num_classes
    if classes is None:
      if labels is not None:
        raise InputError("labels were given to a network without classes")
      return {}
    if labels is None:
      raise InputError(
          f"labels are missing: the classes, 0 to {classes - 1}, of the images"
      )
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape not in ((), (n,)):
      raise InputError(
          f"labels are {labels.dtype} {list(labels.shape)}, expected one whole "
          f"number or {n}"
      )
    if labels.min() < 0 or labels.max() >= classes:
      raise InputError(
          f"labels reach from {labels.min()} to {labels.max()}; this network "
          f"knows classes 0 to {classes - 1}"
      )
    return {"labels": np.broadcast_to(labels, (n,)).astype(np.int32)}

  def _run(
      self, entry: dict[str, Any], rows: dict[str, np.ndarray], seed: int
  ) -> np.ndarray:
    """Calls a function on rows of arrays, batch_size of them at a time."""
    function = self._function(entry["file"])
    fixed = {"weights": self._weights, "seed": _seed(seed)}
    n, results = len(next(iter(rows.values()))), []
    size = min(n, self._batch_size)
    for first in range(0, n, size):
      # The last part is filled up, so that nothing compiles twice.
      taken = np.minimum(np.arange(first, first + size), n - 1)
      given = fixed | {name: array[taken] for name, array in rows.items()}
      result = function(*(given[name] for name in entry["arguments"]))
      results.append(np.asarray(result)[: n - first])
    return np.concatenate(results)

  def _function(self, name: str):
    if name not in self._functions:
      try:
        loaded = export.deserialize(bytearray(self._contents[name]))
      except ImportError:
        raise  # flatbuffers is missing, and jax says so.
      except Exception as e:  # The bytes are as written.
        raise VersionError(
            f"exported by jax {self.manifest['versions']['jax']}, which jax "
            f"{jax.__version__} cannot read ({e}); use a jax nearer to that "
            "one, or export again"
        ) from e
      self._functions[name] = jax.jit(loaded.call)
    return self._functions[name]


def _seed(seed: int) -> np.uint32:
  if not 0 <= operator.index(seed) <= MAX_SEED:
    raise InputError(f"seed={seed} is out of range; give 0 to {MAX_SEED}")
  return np.uint32(seed)


def _index(n: int | Sequence[int]) -> np.ndarray:
  """Numbers of the images: 0 .. n - 1, or those given; int32 [n]."""
  index = np.asarray(n)
  if index.dtype.kind in "iu" and index.ndim == 0:
    index = np.arange(index)
  if index.dtype.kind not in "iu" or index.ndim != 1 or not len(index):
    raise InputError(
        f"{n!r} images; give how many, at least 1, or a list of numbers"
    )
  if index.min() < 0 or index.max() > MAX_INDEX:
    raise InputError(f"numbers of images are 0 to {MAX_INDEX}")
  return index.astype(np.int32)
