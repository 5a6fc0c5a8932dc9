"""Statistics of real images on disk: what a set of samples is compared with.

The keys are those of the ADM evaluator (arr_0, mu, sigma, mu_s, sigma_s), so
that it reads our files and we read its; `meta`, which it passes over, is a
JSON text that says which features they are of. EDM's files hold mu and sigma
alone, a file of samples arr_0 alone.
"""

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
from bcm_jax.metrics.moments import Gaussian
from bcm_jax.utils import files
from bcm_jax.utils import hashing

_STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_MAKE_ANEW = "make the file anew or take another one"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """Statistics of a set of images, the images, or both.

  Attributes:
    pooled: mean and covariance of the features; None in a file of images
      alone.
    spatial: the same of the spatial features of sFID, or None.
    count: images that the statistics are of; None where a file does not say.
    features_name: which features; None where a file does not say.
    features_digest: of the weights that made them; None likewise.
    data: what the images are, in free text.
    images: uint8 [n, H, W, C] for precision and recall, or None; often fewer
      than `count`.
  """

  pooled: Gaussian | None = None
  spatial: Gaussian | None = None
  count: int | None = None
  features_name: str | None = None
  features_digest: str | None = None
  data: str = ""
  images: np.ndarray | None = None

  def digest(self) -> str:
    """Returns 12 hex digits of the mean and covariance of `pooled`."""
    parts = [("", np.asarray(p, "<f8")) for p in self.pooled]
    return hashing.arrays_digest(parts)[:12]


def save_reference(
  path: str | os.PathLike[str], reference: Reference
) -> None:
  """Writes an .npz, whole or not at all, over what was there.

  Args:
    path: the file; its folder is made where there is none.
    reference: what `load_reference` gives back bit by bit.

  Raises:
    UserError: arrays that `load_reference` would refuse.
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
  }
  files.write_npz(path, **arrays, meta=np.array(json.dumps(meta)))


def load_reference(path: str | os.PathLike[str]) -> Reference:
  """Reads our files, those of ADM and EDM, and plain samples.

  Returns:
    What the file holds; statistics as float64, whatever they were.

  Raises:
    UserError: no such file, no .npz, pickled arrays, neither statistics nor
      images, half of a pair, shapes that do not fit, or NaN.
  """
  path = os.fspath(path)
  arrays = _read(path)
  meta = _meta(path, arrays.pop("meta", None))
  _check(path, arrays)
  pooled, spatial = (
    Gaussian(*(arrays[key].astype(np.float64) for key in keys))
    if keys[0] in arrays
    else None
    for keys in _STATISTICS
  )
  return Reference(pooled, spatial, images=arrays.get("arr_0"), **meta)


def check_features(reference: Reference, name: str, digest: str) -> None:
  """Checks that there are statistics and that they are of these features.

  A file of another tool does not say; that is a warning in the log.

  Args:
    reference: the statistics.
    name: the features that samples are going to be given.
    digest: of the weights that make those.

  Raises:
    UserError: the reference holds images alone, or was made with other
      features; both are named.
  """
  if reference.pooled is None:
    raise UserError(
      "the reference holds images and no statistics, expected mu and sigma: "
      "make statistics of these images first"
    )
  theirs = reference.features_name, reference.features_digest
  if None in theirs:
    logging.warning(
      "the reference statistics do not say with which features they were "
      "made; they are taken as %s %s", name, digest,
    )
  elif theirs != (name, digest):
    raise UserError(
      f"the reference statistics are of the features {' '.join(theirs)}, "
      f"expected {name} {digest} as for the samples: use the same features, "
      "or make the statistics anew with these"
    )


def _read(path: str) -> dict[str, np.ndarray]:
  """The arrays of an .npz that concern us."""
  if not pathlib.Path(path).is_file():
    raise UserError(
      f"there is no file {path}, expected reference statistics or samples as "
      ".npz: check the path"
    )
  known = {key for pair in _STATISTICS for key in pair} | {"arr_0", "meta"}
  try:
    with np.load(path, allow_pickle=False) as file:
      return {key: file[key] for key in known & set(file)}
  # An .npy opens as an array, which cannot be entered.
  except (
    *(ValueError, OSError, EOFError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
  ) as error:
    raise UserError(
      f"{path} cannot be read ({error}), expected a whole .npz without "
      f"pickled objects: {_MAKE_ANEW}"
    ) from error


def _meta(path: str, text: np.ndarray | None) -> dict[str, Any]:
  """What a file says about itself, as fields of a `Reference`."""
  if text is None:
    return {}
  try:
    meta = json.loads(str(text))
    names = ("count", "features_name", "features_digest", "data")
    return {name: meta[name] for name in names}
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"meta of {path} is damaged ({error!r}), expected JSON with count, "
      f"features_name, features_digest and data: {_MAKE_ANEW}"
    ) from error


def _check(path: str, arrays: dict[str, np.ndarray]) -> None:
  """Checks statistics and images that are going to or come from a file."""
  if not {"mu", "arr_0"} & set(arrays):
    raise UserError(
      f"{path} has neither mu nor arr_0, expected statistics or images: "
      f"{_MAKE_ANEW}"
    )
  for mean, covariance in _STATISTICS:
    if (mean in arrays) != (covariance in arrays):
      raise UserError(
        f"{path} has one of {mean} and {covariance}, expected both: "
        f"{_MAKE_ANEW}"
      )
    if mean in arrays:
      _check_gaussian(path, mean, arrays[mean], covariance, arrays[covariance])
  images = arrays.get("arr_0")
  if images is not None and (images.dtype != np.uint8 or images.ndim != 4):
    raise UserError(
      f"arr_0 of {path} is {images.dtype} of shape {images.shape}, expected "
      f"uint8 images [n, H, W, C]: {_MAKE_ANEW}"
    )


def _check_gaussian(
  path: str, mu: str, mean: np.ndarray, sigma: str, covariance: np.ndarray
) -> None:
  good = mean.ndim == 1 and mean.size and covariance.shape == 2 * mean.shape
  if not good or {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
    raise UserError(
      f"{mu} and {sigma} of {path} are {mean.dtype} {mean.shape} and "
      f"{covariance.dtype} {covariance.shape}, expected floating point [D] "
      f"and [D, D]: {_MAKE_ANEW}"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(
      f"{mu} or {sigma} of {path} holds NaN or infinity, expected finite "
      f"numbers: {_MAKE_ANEW}"
    )
