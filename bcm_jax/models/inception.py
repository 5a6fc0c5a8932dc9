"""Inception-v3 for the Frechet inception distance (FID).

Szegedy et al. (2016), with the differences of TensorFlow's graph
inception-2015-12-05: average pooling excludes the padding, the last block uses
max pooling, batch normalization has an epsilon of 1e-3, and there are 1008
classes. Sub-module names follow torchvision and pytorch-fid's weights.

Convolutions and pooling are written for XLA on CPUs, where the standard
operations are two to five times slower: see `_convolve` and `_windows`.
"""

from collections.abc import Iterator
import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.models import dtypes

IMAGE_SIZE = 299
CLASSES = 1008

_HIGHEST = jax.lax.Precision.HIGHEST
_EPSILON = 1e-3
_SPATIAL_CHANNELS = 7


class Outputs(NamedTuple):
  """Features and logits of B images.

  Attributes:
    pooled: [B, 2048], FID features (TensorFlow's pool_3).
    spatial: [B, 2023], sFID features: the first 7 channels of TensorFlow's
      mixed_6/conv at 17 x 17 positions, channels last.
    logits: [B, 1008].
    unbiased_logits: [B, 1008], logits without the bias of the classifier, for
      the Inception score.
  """

  pooled: jax.Array
  spatial: jax.Array
  logits: jax.Array
  unbiased_logits: jax.Array


def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: str
) -> jax.Array:
  """Convolves x [B, H, W, C] with a kernel in HWIO layout."""
  if kernel.shape[:2] == (1, 1):
    return jnp.dot(x, kernel[0, 0], precision=_HIGHEST)
  convolve = functools.partial(
      jax.lax.conv_general_dilated, rhs=kernel, window_strides=(stride, stride),
      dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_HIGHEST,
  )
  if padding == "SAME":
    return convolve(x, padding="SAME")
  # Pads one column and drops it: without padding, XLA's convolution on CPUs
  # takes up to four times as long.
  return convolve(x, padding=((0, 0), (0, stride)))[:, :, :-1]


def _windows(
    x: jax.Array, stride: int, padding: float | None = None
) -> Iterator[jax.Array]:
  """Yields the nine shifted images of 3x3 pooling.

  A pool is an elementwise reduction over these, which XLA vectorizes on CPUs,
  unlike lax.reduce_window.

  Args:
    x: [B, H, W, C].
    stride: stride of the pool.
    padding: value of a border of one pixel; None for no padding.
  """
  if padding is not None:
    frame = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x, frame, constant_values=padding)
  rows, columns = (size - 2 for size in x.shape[1:3])
  for i in range(3):
    for j in range(3):
      yield x[:, i : i + rows : stride, j : j + columns : stride]


def _max_pool(
    x: jax.Array, stride: int = 2, padding: float | None = None
) -> jax.Array:
  return functools.reduce(jnp.maximum, _windows(x, stride, padding))


def _average_pool(x: jax.Array) -> jax.Array:
  """Applies 3x3 average pooling with stride 1 that excludes the padding."""
  rows, columns = (
      np.convolve(np.ones(size), np.ones(3), "same") for size in x.shape[1:3]
  )
  counts = np.outer(rows, columns)[..., None]
  return sum(_windows(x, 1, 0)) / jnp.asarray(counts, x.dtype)


class ConvNorm(nn.Module):
  """Convolution, batch normalization with stored statistics, ReLU.

  Attributes:
    features: number of output channels.
    kernel_size: (height, width).
    stride: stride along both axes.
    padding: 'SAME' or 'VALID'.
    average: precede a 1x1 convolution by 3x3 average pooling. The two commute;
      pooling is applied to the output, which has fewer channels.
  """

  features: int
  kernel_size: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: Literal["SAME", "VALID"] = "SAME"
  average: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    one, zero = nn.initializers.ones_init(), nn.initializers.zeros_init()
    scale, bias, mean, var = (
        self.param(name, init, (self.features,))
        for name, init in (
            ("scale", one), ("bias", zero), ("mean", zero), ("var", one)
        )
    )
    x, kernel, scale, bias, mean, var = nn.dtypes.promote_dtype(
        x, kernel, scale, bias, mean, var
    )
    x = _convolve(x, kernel, self.stride, self.padding)
    if self.average:
      x = _average_pool(x)
    return nn.relu((x - mean) * (scale * jax.lax.rsqrt(var + _EPSILON)) + bias)


def _chain(x: jax.Array, prefix: str, *branch) -> jax.Array:
  """Applies a sequence of ConvNorms, named prefix_1, prefix_2, ..."""
  for i, (features, *kernel_size) in enumerate(branch, 1):
    x = ConvNorm(features, tuple(kernel_size), name=f"{prefix}_{i}")(x)
  return x


class BlockA(nn.Module):
  """Block at 35x35: 1x1, 5x5 and double 3x3 convolutions, and a pool."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.concatenate([
        ConvNorm(64, name="branch1x1")(x),
        _chain(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ConvNorm(self.pool_features, average=True, name="branch_pool")(x),
    ], axis=-1)


class BlockB(nn.Module):
  """Downsampling block from 35x35 to 17x17."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    halve = functools.partial(ConvNorm, kernel_size=(3, 3), stride=2,
                              padding="VALID")
    double = _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3))
    return jnp.concatenate([
        halve(384, name="branch3x3")(x),
        halve(96, name="branch3x3dbl_3")(double),
        _max_pool(x),
    ], axis=-1)


class BlockC(nn.Module):
  """Block at 17x17: 7x7 convolutions factorized into 1x7 and 7x1."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (output of the block, output of its first branch)."""
    width = self.width
    first = ConvNorm(192, name="branch1x1")(x)
    return jnp.concatenate([
        first,
        _chain(x, "branch7x7", (width, 1, 1), (width, 1, 7), (192, 7, 1)),
        _chain(x, "branch7x7dbl", (width, 1, 1), (width, 7, 1), (width, 1, 7),
               (width, 7, 1), (192, 1, 7)),
        ConvNorm(192, average=True, name="branch_pool")(x),
    ], axis=-1), first


class BlockD(nn.Module):
  """Downsampling block from 17x17 to 8x8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    halve = functools.partial(ConvNorm, kernel_size=(3, 3), stride=2,
                              padding="VALID")
    wide = ConvNorm(192, name="branch3x3_1")(x)
    deep = _chain(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1))
    return jnp.concatenate([
        halve(320, name="branch3x3_2")(wide),
        halve(192, name="branch7x7x3_4")(deep),
        _max_pool(x),
    ], axis=-1)


class BlockE(nn.Module):
  """Block at 8x8: 3x3 convolutions as parallel 1x3 and 3x1, and a pool."""

  pool: Literal["mean", "max"]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    wide = ConvNorm(384, name="branch3x3_1")(x)
    deep = _chain(x, "branch3x3dbl", (448, 1, 1), (384, 3, 3))
    pooled = x if self.pool == "mean" else _max_pool(x, 1, -jnp.inf)
    return jnp.concatenate([
        ConvNorm(320, name="branch1x1")(x),
        ConvNorm(384, (1, 3), name="branch3x3_2a")(wide),
        ConvNorm(384, (3, 1), name="branch3x3_2b")(wide),
        ConvNorm(384, (1, 3), name="branch3x3dbl_3a")(deep),
        ConvNorm(384, (3, 1), name="branch3x3dbl_3b")(deep),
        ConvNorm(192, average=self.pool == "mean", name="branch_pool")(pooled),
    ], axis=-1)


class InceptionV3(nn.Module):
  """Inception-v3.

  TensorFlow numbers the blocks from `mixed` (Mixed_5b here) to `mixed_10`
  (Mixed_7c), so `mixed_6/conv` is the first branch of Mixed_6d (see
  torch-fidelity's table of weight names). The sFID features are taken after the
  ReLU, as in ADM-evaluation-suite-pytorch, whose README reports sFID 6.14049 on
  ADM's samples of ImageNet-256 against 6.14043 of ADM's evaluator. The
  TensorFlow graph was not compared with this network.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> Outputs:
    """Computes features and logits, in at least float32.

    Args:
      x: [B, 299, 299, 3] in [-1, 1].
    """
    x = dtypes.at_least_float32(x)
    valid = functools.partial(ConvNorm, padding="VALID")
    x = valid(32, (3, 3), stride=2, name="Conv2d_1a_3x3")(x)
    x = valid(32, (3, 3), name="Conv2d_2a_3x3")(x)
    x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = _max_pool(x)
    self.sow("intermediates", "block0", x)
    x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
    x = valid(192, (3, 3), name="Conv2d_4a_3x3")(x)
    x = _max_pool(x)
    self.sow("intermediates", "block1", x)
    x = BlockA(32, name="Mixed_5b")(x)
    x = BlockA(64, name="Mixed_5c")(x)
    x = BlockA(64, name="Mixed_5d")(x)
    x = BlockB(name="Mixed_6a")(x)
    x, _ = BlockC(128, name="Mixed_6b")(x)
    x, _ = BlockC(160, name="Mixed_6c")(x)
    x, first = BlockC(160, name="Mixed_6d")(x)
    x, _ = BlockC(192, name="Mixed_6e")(x)
    self.sow("intermediates", "block2", x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE("mean", name="Mixed_7b")(x)
    x = BlockE("max", name="Mixed_7c")(x)
    pooled = x.mean(axis=(1, 2))
    spatial = first[..., :_SPATIAL_CHANNELS].reshape(len(first), -1)
    return Outputs(pooled, spatial, *Classifier(CLASSES, name="fc")(pooled))


class Classifier(nn.Module):
  """Dense layer that returns logits of x [B, C] with and without the bias."""

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (x.shape[-1], self.classes)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.classes,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    unbiased = jnp.dot(x, kernel, precision=_HIGHEST)
    return unbiased + bias, unbiased
