"""Feature extractors for FID-like metrics.

A Frechet distance depends on the features as much as on the images, so every
extractor has a name and a digest, which are written to every result. Only the
network and preprocessing of Heusel et al. (2017, arXiv:1706.08500) give a FID;
distances on other features are named 'FD (name of the features)'.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.data import image_source
from bcm_jax.errors import UserError
from bcm_jax.utils import batching
from bcm_jax.utils import hashing

Params = Any


class Activations(NamedTuple):
  """Features of n images.

  Attributes:
    pooled: float [n, D], for Frechet and kernel distances.
    spatial: float [n, S], for sFID; None where not available.
    probabilities: float [n, K], class probabilities for the Inception score;
      None where not available.
  """

  pooled: np.ndarray
  spatial: np.ndarray | None = None
  probabilities: np.ndarray | None = None


class Features(Protocol):
  """Interface of a feature extractor for uint8 images.

  Attributes:
    name: name in results and tables.
    digest: twelve hex digits of a hash of weights and preprocessing.
    distance: name of the Frechet distance on these features.
  """

  name: str
  digest: str
  distance: str

  def __call__(self, images: np.ndarray) -> Activations:
    """Computes the activations of uint8 images [n, H, W, C]."""


def params_digest(preprocessing: str, params: Params) -> str:
  """Returns twelve hex digits of a hash of preprocessing and parameters."""
  parts = [(preprocessing, np.empty(0, np.uint8))]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    leaf = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    parts.append((f"{name}{leaf.dtype}{leaf.shape}", leaf))
  return hashing.arrays_digest(parts)[:12]


def frechet_name(name: str) -> str:
  """Returns the name of the Frechet distance on the named features."""
  return f"FD ({name})"


class NetworkFeatures:
  """Features of a network, computed on all local devices.

  Args:
    name: name of the features.
    apply: (params, images float32 [b, H, W, C] in 0..255) -> Activations; must
      treat the images independently; jitted here.
    params: parameters of the network.
    preprocessing: description of what `apply` does to the images first; part
      of the digest.
    distance: name of the Frechet distance; 'FD (name)' by default.
    batch_size: images per batch, rounded up to a multiple of the devices.
  """

  def __init__(
      self,
      name: str,
      apply: Callable[[Params, jax.Array], Activations],
      params: Params,
      preprocessing: str,
      distance: str | None = None,
      batch_size: int = 64,
  ):
    self.name = name
    self.digest = params_digest(preprocessing, params)
    self.distance = distance or frechet_name(name)
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
    self._split = jax.NamedSharding(mesh, jax.P("data"))
    self._params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    self._batch = -(-batch_size // len(devices)) * len(devices)
    self._apply = jax.jit(
        lambda p, x: apply(p, x.astype(jnp.float32)),
        out_shardings=self._split,
    )

  def __call__(self, images: np.ndarray) -> Activations:
    """Computes the activations of uint8 images [n, H, W, C].

    Raises:
      UserError: images of another dtype or rank.
    """
    image_source.check_images(images, "features")
    parts = []
    for batch, count in batching.padded_batches(images, self._batch):
      result = self._apply(self._params, jax.device_put(batch, self._split))
      parts.append(
          jax.tree.map(lambda a, count=count: np.asarray(a[:count]), result)
      )
    return Activations(*(
        None if field[0] is None else np.concatenate(field)
        for field in zip(*parts, strict=True)
    ))


class Pixels:
  """Raw pixels as features, for tiny images and for tests."""

  name = "raw pixels"
  digest = "pixels"
  distance = frechet_name(name)

  def __call__(self, images: np.ndarray) -> Activations:
    """Scales uint8 images [n, H, W, C] to pooled [n, H W C] in [0, 1]."""
    image_source.check_images(images, "features")
    flat = images.reshape(len(images), -1)
    return Activations(flat / np.float32(255))


class FunctionFeatures:
  """User-defined features: a function of uint8 images [n, H, W, C].

  Args:
    function: images -> array [n, D] or Activations.
    name: name of the features.
    digest: identifier that the user changes whenever the function changes.
  """

  def __init__(self, function: Callable, name: str, digest: str):
    self.name, self.digest = name, digest
    self.distance = frechet_name(name)
    self._function = function

  def __call__(self, images: np.ndarray) -> Activations:
    """Computes the activations of uint8 images [n, H, W, C].

    Raises:
      UserError: the function does not return one row per image.
    """
    image_source.check_images(images, "features")
    result = self._function(images)
    if not isinstance(result, Activations):
      result = Activations(np.asarray(result))
    if result.pooled.ndim != 2 or len(result.pooled) != len(images):
      raise UserError(
          f"features {self.name}: got shape {result.pooled.shape} for "
          f"{len(images)} images, expected ({len(images)}, D); return one row "
          "per image"
      )
    return result
