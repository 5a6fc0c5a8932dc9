"""Reference statistics files for FID, compatible with ADM and EDM.

The keys are those of the ADM evaluator (arr_0, mu, sigma, mu_s, sigma_s), so
that either program reads the other's files. `meta`, which ADM ignores, is JSON
with the features of the statistics. EDM's files have mu and sigma only, files
of samples arr_0 only. EDM2's are pickles of {'fid': {'mu', 'sigma'}, ...}, read
without running any code (utils/unpickle.py).
"""

from collections.abc import Set
import dataclasses
import json
import os
import pathlib
from typing import Any
import zipfile
import zlib

from absl import logging
import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import torch_files
from bcm_jax.metrics import fid
from bcm_jax.metrics.moments import Gaussian
from bcm_jax.utils import files
from bcm_jax.utils import hashing

_STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_RECREATE = "recreate the file or use another one"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """Statistics of a set of images, the images, or both.

  Attributes:
    pooled: mean and covariance of the features; None in a file of images only.
    spatial: mean and covariance of the spatial features of sFID, or None.
    count: number of images of the statistics; None if not recorded.
    features_name: name of the features; None if not recorded.
    features_digest: digest of the features' weights; None if not recorded.
    data: description of the images, free text.
    images: uint8 [n, H, W, C] for precision and recall, or None; often fewer
      than `count`.
    images_digest: fingerprint of the images of the statistics; None if not
      recorded.
  """

  pooled: Gaussian | None = None
  spatial: Gaussian | None = None
  count: int | None = None
  features_name: str | None = None
  features_digest: str | None = None
  data: str = ""
  images: np.ndarray | None = None
  images_digest: str | None = None

  def digest(self) -> str:
    """Returns 12 hex digits that identify the statistics.

    A hash of the digests of images and features, which are exact: statistics
    computed on two machines differ by rounding. Without them, as in files of
    other programs, a hash of mean and covariance.
    """
    if self.images_digest and self.features_digest:
      return hashing.json_digest(
          [self.images_digest, self.features_name, self.features_digest]
      )[:12]
    parts = [("", np.asarray(p, "<f8")) for p in self.pooled]
    return hashing.arrays_digest(parts)[:12]


def save_reference(
  path: str | os.PathLike[str], reference: Reference
) -> None:
  """Writes statistics to an .npz file atomically; replaces an existing file.

  Args:
    path: file to write; its folder is created if missing.
    reference: statistics to write; `load_reference` restores them exactly.

  Raises:
    UserError: arrays that `load_reference` would not accept.
  """
  arrays = {}
  for keys, gaussian in zip(
    _STATISTICS, (reference.pooled, reference.spatial), strict=True
  ):
    if gaussian is not None:
      arrays |= zip(keys, map(np.asarray, gaussian), strict=True)
  if reference.images is not None:
    arrays["arr_0"] = np.asarray(reference.images)
  path = os.path.abspath(path)
  _check(path, arrays)
  meta = {
    "count": reference.count,
    "features_name": reference.features_name,
    "features_digest": reference.features_digest,
    "data": reference.data,
    "images_digest": reference.images_digest,
  }
  files.write_npz(path, **arrays, meta=np.array(json.dumps(meta)))


def load_reference(path: str | os.PathLike[str]) -> Reference:
  """Reads statistics of this package, ADM, EDM or EDM2, or plain samples.

  Returns:
    Contents of the file; statistics as float64.

  Raises:
    UserError: the file is missing, no .npz or .pkl, has pickled arrays, has
      neither statistics nor images, or only one of a mean and its covariance,
      has wrong shapes, or values that are not finite.
  """
  path = os.fspath(path)
  arrays = _read_pickle(path) if path.endswith(".pkl") else _read(path)
  meta = _meta(path, arrays.pop("meta", None))
  _check(path, arrays)
  pooled, spatial = (
    Gaussian(*(arrays[key].astype(np.float64) for key in keys))
    if keys[0] in arrays
    else None
    for keys in _STATISTICS
  )
  return Reference(pooled, spatial, images=arrays.get("arr_0"), **meta)


def load_labels(path: str | os.PathLike[str]) -> np.ndarray | None:
  """Returns arr_1 of an .npz, the labels of its images, or None."""
  return _read(os.fspath(path), {"arr_1"}).get("arr_1")


def check_size(reference: Reference, name: str, activations: Any) -> None:
  """Checks that statistics have the dimensions of the features.

  Args:
    reference: the statistics.
    name: name of the features.
    activations: features of any images, feature_extractors.Activations.

  Raises:
    UserError: other dimensions.
  """
  for gaussian, rows in (
    (reference.pooled, activations.pooled),
    (reference.spatial, activations.spatial),
  ):
    if gaussian is not None and rows is not None and (
      len(gaussian.mean) != rows.shape[1]
    ):
      raise UserError(
        f"eval.reference: got statistics of {len(gaussian.mean)} features, "
        f"expected {rows.shape[1]} as of {name} for images of this data; use "
        "the file of these features"
      )


def check_features(reference: Reference, name: str, digest: str) -> None:
  """Checks that the reference has statistics of the given features.

  Logs a warning for files of other programs, which do not record the features.

  Args:
    reference: the statistics.
    name: name of the features that samples are evaluated with.
    digest: digest of those features.

  Raises:
    UserError: the reference has images only, or statistics of other features;
      both features are named.
  """
  if reference.pooled is None:
    raise UserError(
      "reference: got images and no statistics, expected mu and sigma; "
      "compute statistics of these images first"
    )
  features = reference.features_name, reference.features_digest
  if None in features:
    logging.warning(
      "the reference statistics do not record their features; assuming %s %s",
      name, digest,
    )
  elif features != (name, digest):
    raise UserError(
      f"reference: got statistics of the features {' '.join(features)}, "
      f"expected {name} {digest} as for the samples; use the same features, "
      "or recompute the statistics with these"
    )


def _read_pickle(path: str) -> dict[str, np.ndarray]:
  """Reads mu and sigma of EDM2's pickles, those of Inception."""
  try:
    with open(path, "rb") as file:
      content = torch_files.read_pickle(file.read())
    found = content["fid"] if "fid" in content else content
    return {key: np.asarray(found[key].value) for key in ("mu", "sigma")}
  except (OSError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path}: cannot be read ({error!r}), expected EDM2's pickle with mu and "
      f"sigma of 'fid'; {_RECREATE}"
    ) from error


_KEYS = {key for pair in _STATISTICS for key in pair} | {"arr_0", "meta"}


def _read(path: str, keys: Set[str] = _KEYS) -> dict[str, np.ndarray]:
  """Reads the arrays of an .npz that have these keys."""
  if not pathlib.Path(path).is_file():
    raise UserError(
      f"{path}: file does not exist, expected reference statistics or samples "
      "as .npz; check the path"
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      return {key: file[key] for key in keys & set(file)}
  # AttributeError: np.load returns an array, not a context, for an .npy.
  except (
    *(ValueError, OSError, EOFError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
  ) as error:
    raise UserError(
      f"{path}: cannot be read ({error}), expected a complete .npz without "
      f"pickled objects; {_RECREATE}"
    ) from error


def _meta(path: str, text: np.ndarray | None) -> dict[str, Any]:
  """Parses the metadata of a file into fields of a `Reference`."""
  if text is None:
    return {}
  try:
    meta = json.loads(str(text))
    names = ("count", "features_name", "features_digest", "data")
    # Not in files of earlier versions.
    digest = {"images_digest": meta.get("images_digest")}
    return {name: meta[name] for name in names} | digest
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{path}: meta is corrupt ({error!r}), expected JSON with count, "
      f"features_name, features_digest and data; {_RECREATE}"
    ) from error


def _check(path: str, arrays: dict[str, np.ndarray]) -> None:
  """Checks statistics and images before writing or after reading."""
  if not {"mu", "arr_0"} & set(arrays):
    raise UserError(
      f"{path}: got neither mu nor arr_0, expected statistics or images; "
      f"{_RECREATE}"
    )
  for mean, covariance in _STATISTICS:
    if (mean in arrays) != (covariance in arrays):
      raise UserError(
        f"{path}: got one of {mean} and {covariance}, expected both; "
        f"{_RECREATE}"
      )
    if mean in arrays:
      _check_gaussian(path, mean, arrays[mean], covariance, arrays[covariance])
  images = arrays.get("arr_0")
  if images is not None and (images.dtype != np.uint8 or images.ndim != 4):
    raise UserError(
      f"{path}: arr_0 is {images.dtype} of shape {images.shape}, expected "
      f"uint8 images [n, H, W, C]; {_RECREATE}"
    )


def _check_gaussian(
  path: str, mu: str, mean: np.ndarray, sigma: str, covariance: np.ndarray
) -> None:
  good = mean.ndim == 1 and mean.size and covariance.shape == 2 * mean.shape
  if not good or {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
    raise UserError(
      f"{path}: {mu} and {sigma} are {mean.dtype} {mean.shape} and "
      f"{covariance.dtype} {covariance.shape}, expected floating point [D] "
      f"and [D, D]; {_RECREATE}"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(
      f"{path}: {mu} or {sigma} has NaN or infinity, expected finite numbers; "
      f"{_RECREATE}"
    )
  least = fid.COVARIANCE_TOLERANCE * np.max(np.abs(covariance))
  if np.max(np.abs(covariance - covariance.T)) > least:
    raise UserError(
      f"{path}: {sigma} differs from its transpose, expected a symmetric "
      f"matrix; {_RECREATE}"
    )
  if np.linalg.eigvalsh(covariance.astype(np.float64))[0] < -least:
    raise UserError(
      f"{path}: {sigma} has a negative eigenvalue, expected a covariance; "
      f"{_RECREATE}"
    )
