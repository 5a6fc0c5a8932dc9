"""Layers shared by the U-Nets: PyTorch's initialisation, norms, attention."""

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

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of torch.nn.Conv2d and Linear.
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
  """Applies an odd-sized convolution with symmetric padding to x [B,H,W,C]."""
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
  """Group normalisation, statistics in float32 or wider.

  Sums run over positions first and over a group's channels after, so that the
  long sums stay vectorised over channels.
  The variance is the two-pass form: E[x^2] - E[x]^2 loses digits where a
  channel's mean is large against its spread.

  Attributes:
    num_groups: must divide the channels of x [B, H, W, C].
    epsilon: added to the variance.
  """

  num_groups: int
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (channels,))
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
    wide = dtypes.at_least_float32(x)

    def group_mean(v):
      v = v.mean(axis=(1, 2)).reshape(len(v), self.num_groups, -1)
      v = jnp.broadcast_to(v.mean(axis=-1, keepdims=True), v.shape)
      return v.reshape(-1, 1, 1, channels)

    centred = wide - group_mean(wide)
    gain = scale * jax.lax.rsqrt(group_mean(centred**2) + self.epsilon)
    return (centred * gain + bias).astype(x.dtype)


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
    num_groups: number of groups, fewer where a group would get less than
      min_channels channels.
    epsilon: PyTorch's by default.
  """
  groups = min(num_groups, x.shape[-1] // min_channels)
  return GroupNorm(groups, epsilon, name=name)(x)


def label_embedding(
    labels: jax.Array, num_classes: int, width: int, *, name: str
) -> jax.Array:
  """Rows [B, width] of a table; a label below 0 is no class and gives 0."""
  table = nn.Embed(
      num_classes, width, name=name,
      embedding_init=nn.initializers.normal(1.0),
  )
  rows = table(jnp.maximum(labels, 0))
  return jnp.where((labels >= 0)[:, None], rows, 0)


def augment_embedding(
    labels: jax.Array | None, dim: int, width: int, *, name: str, kernel_init
) -> jax.Array:
  """Projects augmentation labels [B, dim] without a bias; None is all zero."""
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
        f"image of {x.shape[1]}x{x.shape[2]} cannot be halved {count} times; "
        f"its sides must be multiples of {2**count}, or channel_mult shorter"
    )
  if network.two_time != (c_noise_end is not None):
    raise ValueError(f"two_time={network.two_time} contradicts c_noise_end")
  if (network.num_classes is None) != (labels is None):
    raise ValueError(
        f"num_classes={network.num_classes} contradicts labels={labels}; "
        "no class is -1 in a network with classes"
    )
  if augment_labels is not None and not network.augment_dim:
    raise ValueError("augment_labels given, but augment_dim=0")


class Dropout(nn.Module):
  """Dropout with one key an example.

  The mask of an example depends on its own key and on the layer's place in
  the network alone, so it is the same on one device and on eight, and two
  passes given the same keys share their masks. `keys` None means evaluation.
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

  The 'QKV normalisation' that keeps consistency training on ADM stable: the
  norm is taken in float32, so that bfloat16 does not round it.
  """
  wide = dtypes.at_least_float32(x)
  norm = jnp.linalg.norm(wide, axis=-1, keepdims=True)
  return (wide / (1e-4 + norm / math.sqrt(x.shape[-1]))).astype(x.dtype)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: Attention = "xla"
) -> jax.Array:
  """Softmax attention over positions; logits and softmax in float32 or wider.

  bfloat16 goes through jax.nn.dot_product_attention, which has fused kernels.
  It would cut float64 to float32, and takes float16 on GPUs alone.

  Args:
    q, k, v: [B, N, heads, head_dim].
    implementation: of bfloat16; 'cudnn' wants a recent NVIDIA GPU.

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

  The channels of qkv are thirds [Q | K | V], head-major inside each.

  Attributes:
    num_heads: number of heads; must divide the channels.
    groups: most groups of the norm, fewest channels of a group.
    qkv_norm: normalise q, k and v to unit RMS a head and position.
    dtype: dtype of the two projections; None follows the input.
    implementation: of attention in bfloat16.
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


# Collection of a U-Net's features, one tensor a level, fine to coarse.
FEATURES = "intermediates"


def sow_level(module: nn.Module, level: int, h: jax.Array) -> None:
  """Hands out the encoder's last activations of a level, if they are asked for.
  """
  module.sow(FEATURES, f"level{level}", h)


def sown_levels(variables: Any) -> list[jax.Array]:
  """What `apply(..., mutable=FEATURES)` handed out: [B, H, W, C], fine first.
  """
  sown = variables[FEATURES]
  return [sown[f"level{i}"][0] for i in range(len(sown))]
