"""Inception features of images: FID, sFID and Inception score.

Two ways to 299x299 are both called FID in the literature, and differ:

- 'tf1': TensorFlow 1's bilinear resizing, then (x - 128) / 128, as in the
  original graph, ADM's evaluator and EDM's and StyleGAN3's detector.
- 'torch': PyTorch's bilinear resizing, then x / 127.5 - 1, as in pytorch-fid.

Neither looks at more than two neighbours a side, however large the image is.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.errors import UserError
from bcm_jax.metrics.feature_extractors import Activations
from bcm_jax.metrics.feature_extractors import NetworkFeatures
from bcm_jax.models import inception
from bcm_jax.models import layers

Params = Any
Resize = Literal["tf1", "torch"]

NAMES = {
    "tf1": "Inception, TF1 resizing",
    "torch": "Inception, PyTorch resizing",
}


def resize_matrix(
    size: int, resize: Resize, dtype: Any = np.float32
) -> np.ndarray:
  """Weights of `size` pixels in each of 299, linear between two neighbours.

  Pixel i comes from the place i s ('tf1': align_corners=False,
  half_pixel_centers=False) or (i + 1/2) s - 1/2 ('torch': align_corners=False),
  s = size / 299, kept inside the image.

  Args:
    size: pixels of a side.
    resize: 'tf1' or 'torch'.
    dtype: of the images. Places are rounded as there, which decides between
      neighbours: TensorFlow always takes float32, PyTorch the images' dtype.

  Returns:
    float64 [299, size], rows sum to 1.
  """
  number = np.float32 if resize == "tf1" else np.dtype(dtype).type
  scale = number(size) / number(inception.IMAGE_SIZE)
  places = np.arange(inception.IMAGE_SIZE, dtype=number)
  if resize == "tf1":
    places = places * scale
  else:
    places = (places + number(0.5)) * scale - number(0.5)
  places = np.clip(places, 0, size - 1).astype(np.float64)
  lower = np.floor(places).astype(int)
  matrix = np.zeros((len(places), size))
  rows = np.arange(len(places))
  matrix[rows, lower] += 1 - (places - lower)
  matrix[rows, np.minimum(lower + 1, size - 1)] += places - lower
  return matrix


def preprocess(images: jax.Array, resize: Resize) -> jax.Array:
  """What the network sees of images.

  Args:
    images: [B, H, W, C] in 0..255, C = 3, or 1 for grey; any real dtype.
    resize: 'tf1' or 'torch'.

  Returns:
    [B, 299, 299, 3] in [-1, 1], float32 or wider.

  Raises:
    UserError: another number of channels, or an unknown resizing.
  """
  if images.shape[-1] not in (1, 3):
    raise UserError(
        f"Inception got images of shape {images.shape}, expected "
        "[n, H, W, C] with 3 channels, or 1 for grey; drop or add channels"
    )
  if resize not in NAMES:
    raise errors.unknown_name("resizing", resize, NAMES)
  images = images.astype(layers.at_least_float32(images.dtype))
  height, width = (
      jnp.asarray(resize_matrix(size, resize, images.dtype), images.dtype)
      for size in images.shape[1:3]
  )
  images = jnp.einsum(
      "ih,bhwc,jw->bijc", height, images, width,
      precision=jax.lax.Precision.HIGHEST,
  )
  if resize == "tf1":
    images = (images - 128) / 128
  else:
    images = images / 127.5 - 1
  return jnp.broadcast_to(images, (*images.shape[:3], 3))


def activations(
    params: Params, images: jax.Array, resize: Resize = "tf1"
) -> Activations:
  """Pooled features, sFID's, and class probabilities of images.

  Probabilities leave the classifier's bias out, as ADM's evaluator does.

  Args:
    params: of `InceptionV3`, see `interop.inception_names`.
    images: [B, H, W, C] in 0..255, see `preprocess`.
    resize: 'tf1' or 'torch'.
  """
  network = inception.InceptionV3()
  out = network.apply({"params": params}, preprocess(images, resize))
  return Activations(
      out.pooled, out.spatial, jax.nn.softmax(out.unbiased_logits)
  )


def inception_features(
    params: Params, resize: Resize = "tf1", batch_size: int = 32
) -> NetworkFeatures:
  """Inception features of uint8 images; their Frechet distance is the FID.

  Args:
    params: as `interop.inception_names.load_inception` reads them.
    resize: 'tf1' is that of ADM and EDM, 'torch' that of pytorch-fid.
    batch_size: images at a time.

  Raises:
    UserError: unknown resizing.
  """
  if resize not in NAMES:
    raise errors.unknown_name("resizing", resize, NAMES)
  return NetworkFeatures(
      NAMES[resize],
      functools.partial(activations, resize=resize),
      params,
      preprocessing=f"{resize} {inception.IMAGE_SIZE}",
      distance="FID",
      batch_size=batch_size,
  )
