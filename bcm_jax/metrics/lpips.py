"""LPIPS v0.1 with VGG16, a perceptual distance between two images.

Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric" (arXiv:1801.03924), equation 1, as in the package `lpips`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.errors import UserError
from bcm_jax.models import dtypes
from bcm_jax.models import vgg

Params = Any

_TRAINED_SIZE = 224
# Mean and standard deviation of ImageNet's channels, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def _check(x: jax.Array, y: jax.Array) -> None:
  if x.shape != y.shape or x.ndim != 4 or x.shape[-1] not in (1, 3):
    raise UserError(
        f"LPIPS: got images of shapes {x.shape} and {y.shape}, expected equal "
        "shapes [n, H, W, C] with 3 channels, or 1 for gray"
    )
  if min(x.shape[1:3]) < vgg.SMALLEST:
    raise UserError(
        f"LPIPS: got {x.shape[1]}x{x.shape[2]} pixels, expected at least "
        f"{vgg.SMALLEST} per side, because VGG16 downsamples four times; "
        "enlarge both images by the same factor"
    )
  for images in (x, y):
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(
          f"LPIPS: got {images.dtype}, expected floats in [-1, 1]; "
          "convert both with bcm_jax.data.image_source.to_float"
      )


def enlarge(images: jax.Array) -> jax.Array:
  """Resizes images [B, H, W, C] bilinearly to VGG16's training size, 224x224.

  Images with a side of 224 pixels or more are returned unchanged.
  """
  if max(images.shape[1:3]) >= _TRAINED_SIZE:
    return images
  shape = (len(images), _TRAINED_SIZE, _TRAINED_SIZE, images.shape[-1])
  return jax.image.resize(images, shape, "bilinear")


def features(
    params: Params, images: jax.Array, pooling: vgg.Pooling = "max"
) -> list[jax.Array]:
  """Returns VGG16 features of images [B, H, W, C] in [-1, 1], one per block."""
  images = dtypes.at_least_float32(images)
  shift, scale = (jnp.asarray(v, images.dtype) for v in (_SHIFT, _SCALE))
  return vgg.VGG16(pooling).apply({"params": params}, (images - shift) / scale)


@functools.partial(jax.jit, static_argnames="pooling")
def distance(
    params: Params, x: jax.Array, y: jax.Array, pooling: vgg.Pooling = "max"
) -> jax.Array:
  """Computes the LPIPS distance of every pair of images; differentiable.

  Args:
    params: parameters read by `interop.vgg_names.load_lpips`.
    x: [B, H, W, C] in [-1, 1]; C = 3, or 1 for gray; H, W >= 16.
    y: images of the same shape.
    pooling: pooling of VGG16; 'max' as published.

  Returns:
    Distances [B] >= 0, dimensionless; at least float32.

  Raises:
    UserError: wrong or different shapes, images too small, or integer dtype.
  """
  _check(x, y)
  pairs = features(params["vgg"], jnp.concatenate([x, y]), pooling)
  total = 0.0
  for i, both in enumerate(pairs):
    a, b = jnp.split(distances.unit(both), 2)
    weighted = (a - b) ** 2 * params["linear"][f"lin{i}"]
    total += weighted.sum(axis=-1).mean(axis=(1, 2))
  return total
