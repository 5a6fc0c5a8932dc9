"""What images are turned into before two sets of them are compared.

A distance says as much about the features as about the images, so features
carry a name and a digest, and every result tells them. Only the network and
the preprocessing of the FID's authors may be called FID; any other distance is
'FD (name of the features)'.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.utils import hashing

Params = Any


class Activations(NamedTuple):
  """What features say of n images.

  Attributes:
    pooled: float [n, D], for every distance.
    spatial: float [n, S], for sFID; None where features have none.
    probabilities: float [n, K] of classes, for the Inception score; or None.
  """

  pooled: np.ndarray
  spatial: np.ndarray | None = None
  probabilities: np.ndarray | None = None


class Features(Protocol):
  """Features of uint8 images.

  Attributes:
    name: as results and tables print it.
    digest: twelve hex digits of weights and preprocessing.
    distance: what the Frechet distance between such features is called.
  """

  name: str
  digest: str
  distance: str

  def __call__(self, images: np.ndarray) -> Activations:
    """Activations of uint8 images [n, H, W, C]."""


def params_digest(preprocessing: str, params: Params) -> str:
  """Returns twelve hex digits of a preprocessing's name and all parameters."""
  parts = [(preprocessing, np.empty(0, np.uint8))]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    leaf = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    parts.append((f"{name}{leaf.dtype}{leaf.shape}", leaf))
  return hashing.arrays_digest(parts)[:12]


def frechet_name(name: str) -> str:
  """What the Frechet distance on features of this name is called."""
  return f"FD ({name})"


class NetworkFeatures:
  """Features of a network, computed on all devices of this host.

  Args:
    name: of the features.
    apply: (params, images float32 [b, H, W, C] in 0..255) -> Activations;
      jitted here, an example at a time.
    params: of the network.
    preprocessing: what `apply` does to the images first, for the digest.
    distance: what its Frechet distance is called; by default 'FD (name)'.
    batch_size: images at a time.
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
    """Activations of uint8 images [n, H, W, C].

    Raises:
      UserError: images that are not such.
    """
    check_images(images)
    parts = [jax.tree.map(np.asarray, p) for p in self._parts(images)]
    return Activations(*(
        None if field[0] is None else np.concatenate(field)
        for field in zip(*parts, strict=True)
    ))

  def _parts(self, images: np.ndarray) -> Iterator[Activations]:
    for first in range(0, len(images), self._batch):
      part = images[first : first + self._batch]
      count = len(part)
      # The last batch is filled up, so that nothing compiles twice.
      part = np.pad(
          part, [(0, self._batch - count)] + [(0, 0)] * 3, mode="edge"
      )
      result = self._apply(self._params, jax.device_put(part, self._split))
      yield jax.tree.map(lambda a, count=count: a[:count], result)


class Pixels:
  """Raw pixels as features: for tiny images, and for tests."""

  name = "raw pixels"
  digest = "pixels"
  distance = frechet_name(name)

  def __call__(self, images: np.ndarray) -> Activations:
    """Pixels in [0, 1] of uint8 images [n, H, W, C]: pooled [n, H W C]."""
    check_images(images)
    flat = images.reshape(len(images), -1)
    return Activations(flat / np.float32(255))


class FunctionFeatures:
  """A user's function of uint8 images [n, H, W, C] -> [n, D].

  Args:
    function: from images to an array or to Activations.
    name: of the features.
    digest: that changes when the function does; its owner's business.
  """

  def __init__(self, function: Callable, name: str, digest: str):
    self.name, self.digest = name, digest
    self.distance = frechet_name(name)
    self._function = function

  def __call__(self, images: np.ndarray) -> Activations:
    """Activations of uint8 images.

    Raises:
      UserError: the function returned something else than one row an image.
    """
    check_images(images)
    result = self._function(images)
    if not isinstance(result, Activations):
      result = Activations(np.asarray(result))
    if result.pooled.ndim != 2 or len(result.pooled) != len(images):
      raise UserError(
          f"features {self.name} returned shape {result.pooled.shape} for "
          f"{len(images)} images, expected ({len(images)}, D); return one row "
          "an image"
      )
    return result


def check_images(images: np.ndarray) -> None:
  """Raises UserError unless images are uint8 [n, H, W, C], n >= 1."""
  if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
    raise UserError(
        f"features got {images.dtype} of shape {images.shape}, expected uint8 "
        "[n, H, W, C] with n >= 1; quantise to 0..255 first"
    )
