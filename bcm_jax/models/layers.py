"""Layers of the U-Nets: PyTorch initialization, norms, attention, dropout."""

import math
from typing import Any, Literal
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

Dtype = Any
Precision = Literal["float32", "bfloat16", "float16"]
Attention = Literal["xla", "cudnn"]
MatmulPrecision = Literal["default", "high", "highest"]

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch.nn.Conv2d and torch.nn.Linear.
_torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _torch_bias(fan_in: int):
  limit = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


def _inits(fan_in: int, zero: bool) -> dict[str, Any]:
  if zero:
    zeros = nn.initializers.zeros_init()
    return {"kernel_init": zeros, "bias_init": zeros}
  return {"kernel_init": _torch_kernel, "bias_init": _torch_bias(fan_in)}


def conv(
    x: jax.Array,
    features: int,
    kernel_size: int,
    *,
    name: str,
    stride: int = 1,
    zero: bool = False,
    dtype: Dtype | None = None,
) -> jax.Array:
  """Applies a convolution with padding kernel_size // 2 to x [B, H, W, C]."""
  pad = kernel_size // 2
  return nn.Conv(
      features,
      (kernel_size, kernel_size),
      strides=stride,
      padding=((pad, pad), (pad, pad)),
      dtype=dtype,
      name=name,
      **_inits(x.shape[-1] * kernel_size**2, zero),
  )(x)


def linear(
    x: jax.Array,
    features: int,
    *,
    name: str,
    use_bias: bool = True,
    zero: bool = False,
    dtype: Dtype | None = None,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
  """Applies a dense layer to the last axis of x."""
  return nn.Dense(
      features,
      use_bias=use_bias,
      dtype=dtype,
      precision=precision,
      name=name,
      **_inits(x.shape[-1], zero),
  )(x)


class GroupNorm(nn.Module):
  """Group normalization of x [B, H, W, C] with at least float32 statistics.

  Reduces over positions first and over the channels of a group second, so that
  the long sums are vectorized over channels. The variance is computed in two
  passes, because E[x^2] - E[x]^2 cancels if the mean is large compared with the
  standard deviation.

  Attributes:
    num_groups: number of groups, a divisor of the channels.
    epsilon: added to the variance.
  """

  num_groups: int
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (channels,))
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
    inputs = dtypes.at_least_float32(x)

    def group_mean(v):
      v = v.mean(axis=(1, 2)).reshape(len(v), self.num_groups, -1)
      v = jnp.broadcast_to(v.mean(axis=-1, keepdims=True), v.shape)
      return v.reshape(-1, 1, 1, channels)

    centered = inputs - group_mean(inputs)
    gain = scale * jax.lax.rsqrt(group_mean(centered**2) + self.epsilon)
    return (centered * gain + bias).astype(x.dtype)


def group_norm(
    x: jax.Array,
    num_groups: int,
    min_channels: int = 1,
    *,
    name: str,
    epsilon: float = 1e-5,
) -> jax.Array:
  """Applies `GroupNorm` to x [B, H, W, C].

  Args:
    x: [B, H, W, C].
    num_groups: maximum number of groups.
    min_channels: minimum channels per group; reduces the number of groups.
    name: module name.
    epsilon: added to the variance; the default is PyTorch's.
  """
  groups = min(num_groups, x.shape[-1] // min_channels)
  return GroupNorm(groups, epsilon, name=name)(x)


def label_embedding(
    labels: jax.Array, num_classes: int, width: int, *, name: str
) -> jax.Array:
  """Looks up label embeddings [B, width]; 0 for negative labels (no class)."""
  table = nn.Embed(
      num_classes, width, name=name,
      embedding_init=nn.initializers.normal(1.0),
  )
  rows = table(jnp.maximum(labels, 0))
  return jnp.where((labels >= 0)[:, None], rows, 0)


def augment_embedding(
    labels: jax.Array | None, dim: int, width: int, *, name: str, kernel_init
) -> jax.Array:
  """Projects augmentation labels [B, dim] without bias; None is all zeros."""
  if labels is None:
    labels = jnp.zeros((1, dim))
  return nn.Dense(
      width, use_bias=False, kernel_init=kernel_init, name=name
  )(labels)


def check_inputs(
    network, x, c_noise_end, labels, augment_labels=None
) -> None:
  """Checks the inputs of a U-Net against its attributes.

  Args:
    network: the U-Net, called as network(x, c_noise, c_noise_end, labels,
      dropout_keys, augment_labels) with c_noise [B], the conditioning value of
      the start level t, and dropout_keys, [B] keys, one per example; None
      disables dropout.
    x: [B, H, W, C] scaled image c_in(t) x_t.
    c_noise_end: [B] conditioning value of the end level u; needed iff two_time.
    labels: [B] int classes, -1 for none; needed iff num_classes.
    augment_labels: [B, augment_dim]; None is zeros, no augmentation.

  Raises:
    ValueError: the inputs contradict the attributes.
  """
  count = len(network.channel_mult) - 1
  if x.shape[1] % 2**count or x.shape[2] % 2**count:
    raise ValueError(
        f"x: got {x.shape[1]}x{x.shape[2]} pixels, which cannot be halved "
        f"{count} times, expected multiples of {2**count}; shorten channel_mult"
    )
  if network.two_time != (c_noise_end is not None):
    raise ValueError(
        "c_noise_end: expected an array if and only if two_time is True, got "
        f"two_time={network.two_time}"
    )
  if (network.num_classes is None) != (labels is None):
    raise ValueError(
        f"labels: got {labels} with num_classes={network.num_classes}, "
        "expected labels if and only if there are classes; use -1 for no class"
    )
  if augment_labels is not None and not network.augment_dim:
    raise ValueError("augment_labels: expected None with augment_dim=0")


class Dropout(nn.Module):
  """Dropout with one PRNG key per example.

  The mask of an example depends only on its key and on the module path, so it
  does not depend on the number of devices, and two passes with the same keys
  share their masks. `keys=None` disables dropout.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    if keys is None or self.rate == 0.0:
      return x
    layer = zlib.crc32("/".join(self.path).encode())

    def mask(key):
      key = jax.random.fold_in(key, layer)
      return jax.random.bernoulli(key, 1 - self.rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1 - self.rate), 0)


def unit_rms(x: jax.Array) -> jax.Array:
  """Divides x by 1e-4 + its root mean square over the last axis.

  The QKV normalization that stabilizes consistency training of ADM (BCM code).
  The norm is computed in at least float32.
  """
  inputs = dtypes.at_least_float32(x)
  norm = dtypes.safe_sqrt(jnp.sum(inputs**2, axis=-1, keepdims=True))
  return (inputs / (1e-4 + norm / math.sqrt(x.shape[-1]))).astype(x.dtype)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: Attention = "xla"
) -> jax.Array:
  """Computes softmax attention over positions.

  Logits and softmax use at least float32. bfloat16 uses the fused kernels of
  jax.nn.dot_product_attention, which reduces float64 to float32 and supports
  float16 only on GPUs.

  Args:
    q, k, v: [B, N, heads, head_dim].
    implementation: implementation for bfloat16; 'cudnn' requires a recent
      NVIDIA GPU.

  Returns:
    [B, N, heads, head_dim].
  """
  if q.dtype == jnp.bfloat16:
    return jax.nn.dot_product_attention(
        q, k, v, implementation=implementation
    )
  scale = q.shape[-1] ** -0.25
  logits = jnp.einsum(
      "bqhd,bkhd->bhqk", q * scale, k * scale,
      preferred_element_type=jnp.promote_types(jnp.float32, q.dtype),
  )
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class AttentionBlock(nn.Module):
  """x + proj(attention(qkv(GroupNorm(x)))) over all positions.

  The channels of qkv are thirds [Q | K | V], head-major within each.

  Attributes:
    num_heads: number of heads, a divisor of the channels.
    groups: (maximum number of groups, minimum channels per group) of the norm.
    qkv_norm: normalize q, k and v to unit RMS per head and position.
    dtype: dtype of the two projections; None follows the input.
    implementation: attention implementation for bfloat16.
  """

  num_heads: int
  groups: tuple[int, int] = (32, 1)
  qkv_norm: bool = True
  dtype: Dtype | None = None
  implementation: Attention = "xla"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    hidden = group_norm(x, *self.groups, name="norm").reshape(b, h * w, c)
    qkv = linear(hidden, 3 * c, name="qkv", dtype=self.dtype)
    qkv = qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if self.qkv_norm:
      q, k, v = unit_rms(q), unit_rms(k), unit_rms(v)
    hidden = attention(q, k, v, self.implementation).reshape(b, h * w, c)
    out = linear(hidden, c, name="proj_out", zero=True, dtype=self.dtype)
    return x + out.reshape(b, h, w, c)


# Flax collection of the encoder features, one tensor per level.
FEATURES = "intermediates"


def sow_level(module: nn.Module, level: int, h: jax.Array) -> None:
  """Sows the last encoder activations [B, H, W, C] of a level."""
  module.sow(FEATURES, f"level{level}", h)


def sown_levels(variables: Any) -> list[jax.Array]:
  """Returns the sown features [B, H, W, C] of all levels, fine to coarse.

  Args:
    variables: the variables returned by `apply(..., mutable=FEATURES)`.
  """
  sown = variables[FEATURES]
  return [sown[f"level{i}"][0] for i in range(len(sown))]
