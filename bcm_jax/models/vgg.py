"""VGG16 up to its last ReLU: the features that LPIPS compares.

Simonyan and Zisserman (2015), configuration D. Sub-modules carry torchvision's
numbers (`features.28` is `features_28` here); its classifier is left out.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

# Torchvision's numbers of the convolutions, and their channels, by block.
BLOCKS = (
    ((0, 2), 64),
    ((5, 7), 128),
    ((10, 12, 14), 256),
    ((17, 19, 21), 512),
    ((24, 26, 28), 512),
)
_HIGHEST = jax.lax.Precision.HIGHEST
# What four poolings leave at least one position of.
SMALLEST = 2 ** (len(BLOCKS) - 1)


Pooling = Literal["max", "average"]


def _halve(x: jax.Array, pooling: Pooling) -> jax.Array:
  """Maxima or means of 2x2; an odd last row or column is dropped."""
  rows, columns = (size // 2 * 2 for size in x.shape[1:3])
  corners = [
      x[:, i:rows:2, j:columns:2] for i in range(2) for j in range(2)
  ]
  if pooling == "average":
    return sum(corners) / len(corners)
  return functools.reduce(jnp.maximum, corners)


def _products(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves by one matrix product of all 3x3 windows."""
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
  """3x3 convolution that keeps the size."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    # XLA's convolution on CPUs falls to a plain loop on so few positions,
    # thirty times as slow as the product. Images of 32x32 end at 2x2.
    if x.shape[1] * x.shape[2] < 9:
      return _products(x, kernel) + bias
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    ) + bias


class VGG16(nn.Module):
  """The five blocks of convolutions.

  Attributes:
    pooling: between blocks; the weights were trained with 'max', consistency
      models' released LPIPS takes the 'average'.
  """

  pooling: Pooling = "max"

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """Evaluates the network.

    Args:
      x: [B, H, W, 3], scaled as the weights want it; H and W at least
        SMALLEST. Computed in float32 or wider.

    Returns:
      Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3:
      [B, H / 2**i, W / 2**i, channels] of block i from 0, rounded down.
    """
    x = dtypes.at_least_float32(x)
    features = []
    for numbers, channels in BLOCKS:
      x = _halve(x, self.pooling) if features else x
      for number in numbers:
        x = nn.relu(Conv(channels, name=f"features_{number}")(x))
      features.append(x)
    return features
