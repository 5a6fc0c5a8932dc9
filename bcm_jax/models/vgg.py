"""VGG16 features for LPIPS.

Simonyan and Zisserman (2015), configuration D, up to the last ReLU and without
the classifier. Sub-module names follow torchvision (`features.28` is
`features_28`).
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

# For each block: (torchvision's indices of the convolutions, channels).
BLOCKS = (
    ((0, 2), 64),
    ((5, 7), 128),
    ((10, 12, 14), 256),
    ((17, 19, 21), 512),
    ((24, 26, 28), 512),
)
_HIGHEST = jax.lax.Precision.HIGHEST
# Minimum image size: at least one position remains after four pools.
SMALLEST = 2 ** (len(BLOCKS) - 1)


Pooling = Literal["max", "average"]


def _halve(x: jax.Array, pooling: Pooling) -> jax.Array:
  """Applies 2x2 max or average pooling; drops an odd last row or column."""
  rows, columns = (size // 2 * 2 for size in x.shape[1:3])
  corners = [
      x[:, i:rows:2, j:columns:2] for i in range(2) for j in range(2)
  ]
  if pooling == "average":
    return sum(corners) / len(corners)
  return functools.reduce(jnp.maximum, corners)


def _products(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes a 3x3 convolution as one matrix product over all windows."""
  rows, columns = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = [
      x[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)
  ]
  return jnp.dot(
      jnp.concatenate(windows, axis=-1),
      kernel.reshape(-1, kernel.shape[-1]),
      precision=_HIGHEST,
  )


class Conv(nn.Module):
  """3x3 convolution with SAME padding."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    # For few positions, XLA's convolution on CPUs is a scalar loop, which is
    # thirty times as slow as a matrix product. 32x32 images end at 2x2.
    if x.shape[1] * x.shape[2] < 9:
      return _products(x, kernel) + bias
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    ) + bias


class VGG16(nn.Module):
  """The five convolutional blocks of VGG16.

  Attributes:
    pooling: pooling between blocks. The weights were trained with 'max'; the
      LPIPS of the official consistency models uses 'average'.
  """

  pooling: Pooling = "max"

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """Computes the features of all blocks, in at least float32.

    Args:
      x: [B, H, W, 3] with the input normalization of the weights; H and W at
        least SMALLEST.

    Returns:
      Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3: for block
      i = 0 .. 4 an array [B, H // 2**i, W // 2**i, channels].
    """
    x = dtypes.at_least_float32(x)
    features = []
    for numbers, channels in BLOCKS:
      x = _halve(x, self.pooling) if features else x
      for number in numbers:
        x = nn.relu(Conv(channels, name=f"features_{number}")(x))
      features.append(x)
    return features
