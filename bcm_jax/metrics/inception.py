"""Inception features for FID, sFID and the Inception score.

Two resizings to 299x299 are in use; their FIDs are not comparable:

- 'tf1': bilinear resizing of TensorFlow 1, then (x - 128) / 128, as in the
  original graph, ADM's evaluator and the detector of StyleGAN3 and EDM.
- 'torch': bilinear resizing of PyTorch, then x / 127.5 - 1, as in pytorch-fid.

Neither filters before downsampling: each output pixel interpolates between two
input pixels per axis at any image size (Parmar et al., 2022, arXiv:2104.11222).
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
from bcm_jax.models import dtypes
from bcm_jax.models import inception

Params = Any
Resize = Literal["tf1", "torch"]

NAMES = {
    "tf1": "Inception, TF1 resizing",
    "torch": "Inception, PyTorch resizing",
}


def resize_matrix(
    size: int, resize: Resize, dtype: Any = np.float32
) -> np.ndarray:
  """Returns the interpolation matrix of linear resizing to 299 pixels.

  Output pixel i samples the input at i s ('tf1': align_corners=False,
  half_pixel_centers=False) or (i + 1/2) s - 1/2 ('torch': align_corners=False)
  with s = size / 299, clipped to the image.

  Args:
    size: input pixels per side.
    resize: 'tf1' or 'torch'.
    dtype: dtype of the images. Positions are rounded as in the original
      implementation, which can change the neighbors that are used: TensorFlow
      computes positions in float32, PyTorch in the dtype of the images.

  Returns:
    float64 [299, size], rows sum to 1.
  """
  number = np.float32 if resize == "tf1" else np.dtype(dtype).type
  scale = number(size) / number(inception.IMAGE_SIZE)
  positions = np.arange(inception.IMAGE_SIZE, dtype=number)
  if resize == "tf1":
    positions = positions * scale
  else:
    positions = (positions + number(0.5)) * scale - number(0.5)
  positions = np.clip(positions, 0, size - 1).astype(np.float64)
  lower = np.floor(positions).astype(int)
  matrix = np.zeros((len(positions), size))
  rows = np.arange(len(positions))
  matrix[rows, lower] += 1 - (positions - lower)
  matrix[rows, np.minimum(lower + 1, size - 1)] += positions - lower
  return matrix


def preprocess(images: jax.Array, resize: Resize) -> jax.Array:
  """Resizes and normalizes images for the Inception network.

  Args:
    images: [B, H, W, C] in 0..255 with C = 3, or 1 for gray; any real dtype.
    resize: 'tf1' or 'torch'.

  Returns:
    [B, 299, 299, 3] in [-1, 1], at least float32.

  Raises:
    UserError: another number of channels, or an unknown resizing.
  """
  if images.shape[-1] not in (1, 3):
    raise UserError(
        f"Inception: got images of shape {images.shape}, expected "
        "[n, H, W, C] with 3 channels, or 1 for gray; drop or add channels"
    )
  if resize not in NAMES:
    raise errors.unknown_name("resizing", resize, NAMES)
  images = dtypes.at_least_float32(images)
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
  """Computes pooled and spatial features and class probabilities of images.

  Class probabilities are computed without the classifier's bias, as in ADM's
  evaluator.

  Args:
    params: parameters of `InceptionV3`, see `interop.inception_names`.
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
  """Returns the Inception feature extractor, whose Frechet distance is the FID.

  Args:
    params: parameters read by `interop.inception_names.load_inception`.
    resize: 'tf1' as in ADM and EDM, or 'torch' as in pytorch-fid.
    batch_size: images per batch.

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
