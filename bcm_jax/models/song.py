"""SongUNet: the DDPM++ and NCSN++ architectures (Song et al., 2021).

As implemented in EDM (Karras et al., 2022, networks.py). With the settings
`NCSNPP` it is also the network of OpenAI's CIFAR-10 consistency models (jcm),
which differs only in names and in the order of the Fourier features. Sub-module
names follow EDM (`enc.16x16_block0.conv0` is `enc_16x16_block0/conv0`), so that
weights are converted by renaming.

The end level u is embedded in one of two ways. 'blocks' adds an `affine_s` in
every block (CTM; Kim et al., 2024). 'align' follows BCM's ImageNet-64 network;
BCM has no official CIFAR-10 code, so its use here is our own design.
"""

from collections.abc import Sequence
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import embeddings
from bcm_jax.models import layers
from bcm_jax.models import resampling

_HIGHEST = jax.lax.Precision.HIGHEST
_ROOT_HALF = math.sqrt(0.5)
_EPSILON = 1e-6
_GROUPS = (32, 4)
# Variance of layers whose weights are initialized at 1e-5 of the usual scale.
_NEARLY_ZERO = 1e-10


def _xavier(variance: float = 1.0):
  return nn.initializers.variance_scaling(variance, "fan_avg", "uniform")


def _dense(x, features, *, name, variance=1.0, use_bias=True, dtype=None):
  return nn.Dense(
      features, use_bias=use_bias, kernel_init=_xavier(variance), dtype=dtype,
      precision=_HIGHEST if dtype is None else None, name=name,
  )(x)


class Conv(nn.Module):
  """k x k convolution with optional 2x resampling.

  The resampling filter precedes the convolution. With `fused`, downsampling
  follows a convolution with wider padding; the results differ only at the
  edges.

  Attributes:
    features: number of output channels.
    kernel_size: kernel size k.
    resample: None, 'down' or 'up'.
    taps: taps of the resampling filter.
    fused: downsample after the convolution.
    variance: scale of the kernel initialization.
    dtype: dtype of the computation; None follows input and parameters.
  """

  features: int
  kernel_size: int = 3
  resample: str | None = None
  taps: Sequence[float] = (1, 1)
  fused: bool = False
  variance: float = 1.0
  dtype: layers.Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    pad = self.kernel_size // 2
    if self.resample == "up":
      x = resampling.double(x, self.taps)
    elif self.resample == "down" and not self.fused:
      x = resampling.halve(x, self.taps)
    elif self.resample == "down":
      pad += (len(self.taps) - 1) // 2
    kernel = self.param(
        "kernel", _xavier(self.variance),
        (self.kernel_size, self.kernel_size, x.shape[-1], self.features),
    )
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(
        x, kernel, bias, dtype=self.dtype
    )
    x = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if self.resample == "down" and self.fused:
      x = resampling.halve(x, self.taps, padding=0)
    return x + bias


class Block(nn.Module):
  """Residual block with optional self-attention (EDM's UNetBlock).

  Attributes:
    features: number of output channels.
    dropout: dropout rate.
    resample: None, 'down' or 'up', in both paths.
    attend: apply single-head attention after the residual sum.
    taps: taps of the resampling filter.
    dtype: dtype of the convolutions; None follows input and parameters.
    attention: attention implementation for bfloat16.
  """

  features: int
  dropout: float = 0.0
  resample: str | None = None
  attend: bool = False
  taps: Sequence[float] = (1, 1)
  dtype: layers.Dtype | None = None
  attention: layers.Attention = "xla"

  @nn.compact
  def __call__(self, x, emb, emb_end=None, dropout_keys=None):
    def norm(h, name):
      return layers.group_norm(h, *_GROUPS, name=name, epsilon=_EPSILON)

    h = nn.silu(norm(x, "norm0"))
    h = Conv(
        self.features, 3, self.resample, self.taps, dtype=self.dtype,
        name="conv0",
    )(h)
    shift = _dense(emb, self.features, name="affine")
    if emb_end is not None:
      shift += _dense(emb_end, self.features, name="affine_s")
    h = nn.silu(norm(h + shift.astype(h.dtype)[:, None, None, :], "norm1"))
    h = layers.Dropout(self.dropout)(h, dropout_keys)
    h = Conv(
        self.features, variance=_NEARLY_ZERO, dtype=self.dtype, name="conv1"
    )(h)
    if self.resample or x.shape[-1] != self.features:
      x = Conv(
          self.features, 1, self.resample, self.taps, dtype=self.dtype,
          name="skip",
      )(x)
    h = (h + x) * _ROOT_HALF
    if self.attend:
      h = (h + self._attend(norm(h, "norm2"))) * _ROOT_HALF
    return h

  def _attend(self, h):
    b, height, width, c = h.shape
    h = h.reshape(b, height * width, 1, c)
    # Scale 0.2 with the fan of 3c channels equals 0.1 with the fan of c each.
    qkv = _dense(h, 3 * c, name="qkv", variance=0.2, dtype=self.dtype)
    h = layers.attention(*jnp.split(qkv, 3, axis=-1), self.attention)
    h = _dense(h, c, name="proj", variance=_NEARLY_ZERO, dtype=self.dtype)
    return h.reshape(b, height, width, c)


class SongUNet(nn.Module):
  """SongUNet F(x, c_noise, c_noise_end, labels) with c_noise = ln(t) / 4.

  Attributes:
    model_channels: base width; 128 for CIFAR-10.
    out_channels: number of output channels.
    channel_mult: width of each level, in units of model_channels.
    num_res_blocks: residual blocks per level (one more in the decoder).
    attention_resolutions: resolutions in pixels with attention.
    num_classes: number of classes; None is unconditional.
    two_time: add a time embedding for the end level u (BCM, CTM).
    end_branch: how the embedding of u is combined: 'align' by a bias-free dense
      layer with that of t (BCM), 'blocks' in every residual block (CTM).
    augment_dim: size of EDM's augmentation labels; 0 disables them.
    dropout: dropout rate of every block.
    embedding: noise level embedding, 'positional' (DDPM++) or 'fourier'
      (NCSN++).
    embedding_mult: size of that embedding, in units of model_channels.
    channel_mult_emb: width of the layers that follow it, in the same units.
    fourier_scale: standard deviation of the Fourier frequencies.
    encoder: 'standard', or with an input pyramid: 'skip' or 'residual'.
    decoder: 'standard', or 'skip': the output is a sum over levels.
    resample_filter: taps of the resampling filter.
    dtype: dtype of the convolutions except the last; None follows input and
      parameters.
    float32_levels: number of levels, from the finest, that are computed in
      float32 or wider despite dtype. Consistency residuals, differences of
      nearly equal outputs, need the finest level; denoisers need none.
    precision: precision of convolutions and matrix products of float32 arrays;
      'default' is one bfloat16 pass on TPUs and TF32 on GPUs.
    attention: attention implementation for bfloat16.
    remat: recompute blocks in the backward pass to save memory.
  """

  model_channels: int = 128
  out_channels: int = 3
  channel_mult: tuple[int, ...] = (2, 2, 2)
  num_res_blocks: int = 4
  attention_resolutions: tuple[int, ...] = (16,)
  num_classes: int | None = None
  two_time: bool = False
  end_branch: Literal["align", "blocks"] = "align"
  augment_dim: int = 0
  dropout: float = 0.0
  embedding: Literal["positional", "fourier"] = "positional"
  embedding_mult: int = 1
  channel_mult_emb: int = 4
  fourier_scale: float = 16.0
  encoder: Literal["standard", "skip", "residual"] = "standard"
  decoder: Literal["standard", "skip"] = "standard"
  resample_filter: tuple[int, ...] = (1, 1)
  dtype: layers.Precision | None = None
  float32_levels: int = 1
  precision: layers.MatmulPrecision = "highest"
  attention: layers.Attention = "xla"
  remat: bool = False

  # {layer of the end-level embedding: layer of the first}, and the align layer.
  SECOND_TIME = {f"map_layer{k}_end": f"map_layer{k}" for k in "01"}
  ALIGN = "map_align"

  @staticmethod
  def last_layer(tree):
    """Returns the last-layer kernel for CTM's adaptive weights.

    The output convolution, from parameters or gradients.
    """
    heads = [k for k in tree if k.endswith("_aux_conv")]
    sizes = {int(k.split("x")[-1].split("_")[0]): k for k in heads}
    return tree[sizes[max(sizes)]]["kernel"]

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      c_noise: jax.Array,
      c_noise_end: jax.Array | None = None,
      labels: jax.Array | None = None,
      dropout_keys: jax.Array | None = None,
      augment_labels: jax.Array | None = None,
  ) -> jax.Array:
    """Evaluates the raw network; arguments as in layers.check_inputs.

    Returns:
      [B, H, W, out_channels], float32 or wider.
    """
    layers.check_inputs(self, x, c_noise_end, labels, augment_labels)
    head_dtype = jnp.promote_types(jnp.float32, x.dtype)
    with jax.default_matmul_precision(self.precision):
      emb = self._embedding(c_noise, c_noise_end, labels, augment_labels)
      h = x if self._dtype(0) is None else x.astype(self.dtype)
      skips = self._encode(h, emb, dropout_keys)
      return self._decode(skips, emb, dropout_keys, head_dtype)

  def _dtype(self, level: int):
    """Returns the dtype of a level; None follows input and parameters."""
    return None if level < self.float32_levels else self.dtype

  def _embedding(self, c_noise, c_noise_end, labels, augment_labels):
    """Returns (emb, emb_end) after the last SiLU, at least float32."""
    noise = self.model_channels * self.embedding_mult
    width = self.channel_mult_emb * self.model_channels

    features = (
        embeddings.Fourier(noise, self.fourier_scale, name="map_noise")
        if self.embedding == "fourier"
        else lambda v: embeddings.sinusoidal_embedding(v, noise, endpoint=True)
    )
    label = jnp.zeros(())
    if self.num_classes is not None:
      table = nn.Dense(noise, kernel_init=_xavier(), name="map_label")
      one_hot = jax.nn.one_hot(labels, self.num_classes, dtype=c_noise.dtype)
      label = table(one_hot * math.sqrt(self.num_classes))
    augment = jnp.zeros(())
    if self.augment_dim:
      augment = layers.augment_embedding(
          augment_labels, self.augment_dim, noise, name="map_augment",
          kernel_init=_xavier(),
      )

    def branch(value, label, suffix=""):
      # EDM's order: sines, then cosines.
      e = jnp.roll(features(value), noise // 2, axis=-1) + label
      e = nn.silu(_dense(e, width, name=f"map_layer0{suffix}"))
      return _dense(e, width, name=f"map_layer1{suffix}")

    emb = branch(c_noise, label + augment)
    if self.two_time and self.end_branch == "blocks":
      return nn.silu(emb), nn.silu(branch(c_noise_end, label, "_s"))
    if self.two_time:
      both = jnp.concatenate([emb, branch(c_noise_end, 0, "_end")], axis=-1)
      emb = _dense(both, width, name=self.ALIGN, use_bias=False)
    return nn.silu(emb), None

  def _block(self, h, emb, dropout_keys, features, level, name, *,
             resample=None, attend=False):
    block = nn.remat(Block) if self.remat else Block
    return block(
        features, self.dropout, resample, attend, self.resample_filter,
        self._dtype(level), self.attention, name=name,
    )(h, *emb, dropout_keys)

  def _pyramid(self, level, name, features, h, aux):
    """Adds the input pyramid at a level; returns (h, pyramid)."""
    dtype = self._dtype(level)
    down = dict(resample="down", taps=self.resample_filter, dtype=dtype)
    if self.encoder == "skip":
      aux = resampling.halve(aux, self.resample_filter)
      h += Conv(features, 1, dtype=dtype, name=f"{name}_aux_skip")(aux)
    elif self.encoder == "residual":
      aux = Conv(features, fused=True, name=f"{name}_aux_residual", **down)(aux)
      h = aux = (h + aux) * _ROOT_HALF
    return h, aux

  def _encode(self, x, emb, dropout_keys):
    """Returns the skip connections, first to last."""
    size, skips, aux = x.shape[1], [], x
    for level, mult in enumerate(self.channel_mult):
      name = f"enc_{size}x{size}"
      if level == 0:
        h = Conv(
            self.model_channels, dtype=self._dtype(0), name=f"{name}_conv"
        )(x)
      else:
        width = h.shape[-1]
        h = self._block(
            h, emb, dropout_keys, width, level, f"{name}_down",
            resample="down",
        )
        h, aux = self._pyramid(level, name, width, h, aux)
      skips.append(h)
      for index in range(self.num_res_blocks):
        h = self._block(
            h, emb, dropout_keys, self.model_channels * mult, level,
            f"{name}_block{index}",
            attend=size in self.attention_resolutions,
        )
        skips.append(h)
      layers.sow_level(self, level, h)
      size //= 2
    return skips

  def _decode(self, skips, emb, dropout_keys, head_dtype):
    """Applies the decoder; skips are used from last to first."""
    h, skips, out = skips[-1], list(skips), None
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      lowest = level == len(self.channel_mult) - 1
      size = h.shape[1] if lowest else h.shape[1] * 2
      name, width = f"dec_{size}x{size}", h.shape[-1]
      if lowest:
        h = self._block(
            h, emb, dropout_keys, width, level, f"{name}_in0", attend=True
        )
        h = self._block(h, emb, dropout_keys, width, level, f"{name}_in1")
      else:
        h = self._block(
            h, emb, dropout_keys, width, level, f"{name}_up", resample="up"
        )
      for index in range(self.num_res_blocks + 1):
        last = index == self.num_res_blocks
        h = self._block(
            jnp.concatenate([h, skips.pop()], axis=-1), emb, dropout_keys,
            self.model_channels * mult, level, f"{name}_block{index}",
            attend=last and size in self.attention_resolutions,
        )
      if self.decoder == "skip" or level == 0:
        head = self._head(h, name, head_dtype)
        if out is not None:
          head += resampling.double(out, self.resample_filter)
        out = head
    return out

  def _head(self, h, name, dtype):
    h = layers.group_norm(
        h.astype(dtype), *_GROUPS, name=f"{name}_aux_norm", epsilon=_EPSILON
    )
    return Conv(
        self.out_channels, variance=_NEARLY_ZERO, name=f"{name}_aux_conv"
    )(nn.silu(h))


# Settings of EDM's and jcm's NCSN++ for CIFAR-10; the defaults are DDPM++.
NCSNPP = dict(
    embedding="fourier", embedding_mult=2, encoder="residual",
    resample_filter=(1, 3, 3, 1),
)
