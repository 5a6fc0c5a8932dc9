"""LPIPS v0.1 with VGG16: how different two images look.

Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", equation 1, as the package `lpips` computes it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.errors import UserError
from bcm_jax.models import layers
from bcm_jax.models import vgg

Params = Any

_TRAINED_SIZE = 224
# ImageNet's mean and deviation of colours, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def _check(x: jax.Array, y: jax.Array) -> None:
  if x.shape != y.shape or x.ndim != 4 or x.shape[-1] not in (1, 3):
    raise UserError(
        f"LPIPS got images of shapes {x.shape} and {y.shape}, expected two "
        "equal ones [n, H, W, C] with 3 channels, or 1 for grey"
    )
  if min(x.shape[1:3]) < vgg.SMALLEST:
    raise UserError(
        f"LPIPS got images of {x.shape[1]}x{x.shape[2]} pixels, expected at "
        f"least {vgg.SMALLEST} a side, since VGG16 halves them four times; "
        "enlarge both alike"
    )
  for images in (x, y):
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(
          f"LPIPS got images of {images.dtype}, expected floats in [-1, 1]; "
          "convert both with bcm_jax.data.image_source.to_float"
      )


def enlarge(images: jax.Array) -> jax.Array:
  """Images [B, H, W, C], bilinearly, of the size that VGG16 was trained on.

  Those that are larger stay as they are.
  """
  if max(images.shape[1:3]) >= _TRAINED_SIZE:
    return images
  shape = (len(images), _TRAINED_SIZE, _TRAINED_SIZE, images.shape[-1])
  return jax.image.resize(images, shape, "bilinear")


def features(
    params: Params, images: jax.Array, pooling: vgg.Pooling = "max"
) -> list[jax.Array]:
  """VGG16's features of images [B, H, W, C] in [-1, 1], one tensor a block."""
  images = images.astype(layers.at_least_float32(images.dtype))
  shift, scale = (jnp.asarray(v, images.dtype) for v in (_SHIFT, _SCALE))
  return vgg.VGG16(pooling).apply({"params": params}, (images - shift) / scale)


@functools.partial(jax.jit, static_argnames="pooling")
def distance(
    params: Params, x: jax.Array, y: jax.Array, pooling: vgg.Pooling = "max"
) -> jax.Array:
  """LPIPS between two images, of every pair; differentiable.

  Args:
    params: as `interop.vgg_names.load_lpips` reads them.
    x: [B, H, W, C] in [-1, 1]; C = 3, or 1 for grey; H, W >= 16.
    y: the same shape.
    pooling: of the network, 'max' for LPIPS as published.

  Returns:
    [B], at least 0, of no unit; float32 or wider.

  Raises:
    UserError: other shapes, images too small, or integers.
  """
  _check(x, y)
  pairs = features(params["vgg"], jnp.concatenate([x, y]), pooling)
  total = 0.0
  for i, both in enumerate(pairs):
    a, b = jnp.split(distances.unit(both), 2)
    weighted = (a - b) ** 2 * params["linear"][f"lin{i}"]
    total += weighted.sum(axis=-1).mean(axis=(1, 2))
  return total
