"""The ADM U-Net in the forms that iCT and BCM train on ImageNet-64.

Dhariwal & Nichol (2021), with the changes of Li & He (BCM, 2024): additive or
scale-shift conditioning, normalised QKV, dropout at low resolutions only and a
second time branch for the end level u. Sub-modules carry the names of the
published state dicts (`input_blocks.4.0.in_layers.2` is
`input_blocks_4_0/in_layers_2` here), so that weights convert by renaming.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import embeddings
from bcm_jax.models import layers

Dtype = Any
_HIGHEST = jax.lax.Precision.HIGHEST


def _downsample(x: jax.Array) -> jax.Array:
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def _upsample(x: jax.Array) -> jax.Array:
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


_RESAMPLE = {None: lambda x: x, "down": _downsample, "up": _upsample}


class ResBlock(nn.Module):
  """GN-SiLU-conv, embedding, GN-SiLU-dropout-conv(0), plus the skip.

  Attributes:
    features: output channels.
    resample: None, 'down' (2x2 mean) or 'up' (nearest x2) of both paths.
    scale_shift: condition by GN(h) * (1 + scale) + shift instead of by adding.
  """

  features: int
  dropout: float = 0.0
  resample: str | None = None
  scale_shift: bool = False
  num_groups: int = 32
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x, emb, dropout_keys=None):
    resample = _RESAMPLE[self.resample]
    h = nn.silu(layers.group_norm(x, self.num_groups, name="in_layers_0"))
    h, x = resample(h), resample(x)
    h = layers.conv(h, self.features, 3, name="in_layers_2", dtype=self.dtype)

    width = self.features * (2 if self.scale_shift else 1)
    emb = layers.linear(nn.silu(emb), width, name="emb_layers_1")
    emb = emb.astype(h.dtype)[:, None, None, :]
    if self.scale_shift:
      scale, shift = jnp.split(emb, 2, axis=-1)
      h = layers.group_norm(h, self.num_groups, name="out_layers_0")
      h = h * (1 + scale) + shift
    else:
      h = layers.group_norm(h + emb, self.num_groups, name="out_layers_0")
    h = layers.Dropout(self.dropout)(nn.silu(h), dropout_keys)
    h = layers.conv(
        h, self.features, 3, name="out_layers_3", zero=True, dtype=self.dtype
    )
    if x.shape[-1] != self.features:
      x = layers.conv(
          x, self.features, 1, name="skip_connection", dtype=self.dtype
      )
    return x + h


class Downsample(nn.Module):
  """3x3 convolution of stride 2, where resblock_updown is off."""

  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x):
    return layers.conv(
        x, x.shape[-1], 3, stride=2, name="op", dtype=self.dtype
    )


class Upsample(nn.Module):
  """Nearest x2, then a 3x3 convolution, where resblock_updown is off."""

  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x):
    return layers.conv(
        _upsample(x), x.shape[-1], 3, name="conv", dtype=self.dtype
    )


class ADM(nn.Module):
  """The ADM U-Net F(x, c_noise, c_noise_end, labels).

  Attributes:
    model_channels: channels at full resolution; 192 on ImageNet-64.
    out_channels: channels of the output, those of the image.
    channel_mult: width of each level, in model_channels.
    num_res_blocks: residual blocks a level (the decoder has one more).
    attention_resolutions: resolutions (pixels a side) that get attention.
    num_head_channels: channels a head; None takes num_heads heads instead.
    num_classes: classes of the label embedding; None is unconditional.
    two_time: second time branch for the end level, mixed in by a bias-free
      align layer (BCM). False is the plain consistency model.
    resblock_updown: resample inside residual blocks, not by convolutions.
    use_scale_shift_norm: scale-shift conditioning (OpenAI's CM) instead of
      additive (iCT and BCM).
    qkv_norm: normalise q, k, v (stabilises consistency training).
    dropout: dropout above `dropout_resolution`.
    low_res_dropout: dropout at and below it; None is `dropout` everywhere. A
      resampling block counts to the level it leaves.
    num_groups: groups of every GroupNorm; 32 in the published networks.
      A width of num_groups leaves one channel a group, whose norm wipes out
      an additive embedding: small networks need fewer groups.
    dtype: dtype of the convolutions in the torso (bfloat16 on accelerators);
      None follows input and parameters. Embeddings, norms' statistics,
      softmax and the head stay in float32 or wider.
  """

  model_channels: int = 192
  out_channels: int = 3
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_res_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (16, 8)
  num_head_channels: int | None = 64
  num_heads: int = 4
  num_classes: int | None = None
  two_time: bool = False
  resblock_updown: bool = True
  use_scale_shift_norm: bool = False
  qkv_norm: bool = True
  dropout: float = 0.0
  low_res_dropout: float | None = None
  dropout_resolution: int = 16
  num_groups: int = 32
  dtype: Dtype | None = None

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      c_noise: jax.Array,
      c_noise_end: jax.Array | None = None,
      labels: jax.Array | None = None,
      dropout_keys: jax.Array | None = None,
  ) -> jax.Array:
    """Evaluates the raw network.

    Args:
      x: [B, H, W, C] scaled image c_in(t) x_t.
      c_noise: [B] conditioning value of the start level t.
      c_noise_end: [B] that of the end level u; needed iff two_time.
      labels: [B] int classes; needed iff num_classes.
      dropout_keys: [B] keys, one an example; None switches dropout off.

    Returns:
      [B, H, W, out_channels], float32 or wider.

    Raises:
      ValueError: for an input that does not fit the attributes.
    """
    self._check(x, c_noise_end, labels)
    emb = self._embedding(c_noise, c_noise_end, labels)
    wide = layers.at_least_float32(x.dtype)
    h = x if self.dtype is None else x.astype(self.dtype)
    h = self._torso(h, emb, dropout_keys)
    h = nn.silu(
        layers.group_norm(h.astype(wide), self.num_groups, name="out_0")
    )
    return layers.conv(h, self.out_channels, 3, name="out_2", zero=True)

  def _check(self, x, c_noise_end, labels):
    halvings = 2 ** (len(self.channel_mult) - 1)
    if x.shape[1] % halvings or x.shape[2] % halvings:
      raise ValueError(
          f"image of {x.shape[1]}x{x.shape[2]} cannot be halved "
          f"{len(self.channel_mult) - 1} times; its sides must be multiples "
          f"of {halvings}, or channel_mult shorter"
      )
    if self.two_time != (c_noise_end is not None):
      raise ValueError(f"two_time={self.two_time} contradicts c_noise_end")
    if (self.num_classes is None) != (labels is None):
      raise ValueError(
          f"num_classes={self.num_classes} contradicts labels={labels}"
      )

  def _embedding(self, c_noise, c_noise_end, labels):
    """Embedding [B, 4 model_channels] of times and class, float32 or wider."""
    width = 4 * self.model_channels

    def branch(value, name):
      e = embeddings.sinusoidal_embedding(value, self.model_channels)
      e = layers.linear(e, width, name=f"{name}_0", precision=_HIGHEST)
      return layers.linear(
          nn.silu(e), width, name=f"{name}_2", precision=_HIGHEST
      )

    emb = branch(c_noise, "time_embed")
    if self.two_time:
      both = jnp.concatenate([emb, branch(c_noise_end, "time_embed_end")], -1)
      # In full precision, so that the start [I | 0] of fine-tuning is exact.
      emb = layers.linear(
          both, width, name="time_embed_align", use_bias=False,
          precision=_HIGHEST,
      )
    if self.num_classes is not None:
      emb = emb + nn.Embed(
          self.num_classes, width, name="label_emb",
          embedding_init=nn.initializers.normal(1.0),
      )(labels)
    return emb

  def _res(self, h, emb, dropout_keys, features, size, name, resample=None):
    return ResBlock(
        features, self._rate(size), resample, self.use_scale_shift_norm,
        self.num_groups, self.dtype, name=name,
    )(h, emb, dropout_keys)

  def _attend(self, h, name):
    heads = self.num_heads
    if self.num_head_channels is not None:
      heads = h.shape[-1] // self.num_head_channels
    return layers.AttentionBlock(
        heads, self.num_groups, self.qkv_norm, self.dtype, name=name
    )(h)

  def _torso(self, h, emb, dropout_keys):
    """Encoder, middle and decoder: [B,H,W,C] -> [B,H,W,model_channels]."""
    skips = self._encoder(h, emb, dropout_keys)
    h = skips[-1]
    size = h.shape[1]
    for part in ("0", "1", "2"):
      name = f"middle_block_{part}"
      if part == "1":
        h = self._attend(h, name)
      else:
        h = self._res(h, emb, dropout_keys, h.shape[-1], size, name)
    return self._decoder(h, skips, emb, dropout_keys)

  def _encoder(self, h, emb, dropout_keys):
    """Outputs of all input blocks, first to last."""
    size = h.shape[1]
    h = layers.conv(
        h, self.model_channels * self.channel_mult[0], 3,
        name="input_blocks_0_0", dtype=self.dtype,
    )
    skips = [h]
    for level, mult in enumerate(self.channel_mult):
      for _ in range(self.num_res_blocks):
        name = f"input_blocks_{len(skips)}"
        h = self._res(
            h, emb, dropout_keys, self.model_channels * mult, size,
            f"{name}_0",
        )
        if size in self.attention_resolutions:
          h = self._attend(h, f"{name}_1")
        skips.append(h)
      if level == len(self.channel_mult) - 1:
        break
      name = f"input_blocks_{len(skips)}_0"
      if self.resblock_updown:
        h = self._res(h, emb, dropout_keys, h.shape[-1], size, name, "down")
      else:
        h = Downsample(self.dtype, name=name)(h)
      skips.append(h)
      size //= 2
    return skips

  def _decoder(self, h, skips, emb, dropout_keys):
    """Consumes the encoder's outputs last to first."""
    size, skips, index = h.shape[1], list(skips), 0
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      for block in range(self.num_res_blocks + 1):
        name, part = f"output_blocks_{index}", 1
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._res(
            h, emb, dropout_keys, self.model_channels * mult, size,
            f"{name}_0",
        )
        if size in self.attention_resolutions:
          h, part = self._attend(h, f"{name}_1"), 2
        if level and block == self.num_res_blocks:
          name = f"{name}_{part}"
          if self.resblock_updown:
            h = self._res(h, emb, dropout_keys, h.shape[-1], size, name, "up")
          else:
            h = Upsample(self.dtype, name=name)(h)
          size *= 2
        index += 1
    return h

  def _rate(self, size: int) -> float:
    low = size <= self.dropout_resolution and self.low_res_dropout is not None
    return self.low_res_dropout if low else self.dropout


def add_second_time(one_time: dict, fresh: dict) -> dict:
  """Parameters of a two-time network that start as a one-time network.

  The second branch starts as a copy of the first and the align layer as
  [I | 0], so that the network output does not change and does not depend on
  the end level (Li & He, cm_train.py).

  Args:
    one_time: parameters of an `ADM` with two_time=False.
    fresh: parameters of the same `ADM` with two_time=True; gives the
      align layer's size and dtype.
  """
  params = dict(one_time)
  for part in ("0", "2"):
    params[f"time_embed_end_{part}"] = one_time[f"time_embed_{part}"]
  align = fresh["time_embed_align"]["kernel"]
  half = align.shape[1]
  params["time_embed_align"] = {
      "kernel": jnp.eye(2 * half, half, dtype=align.dtype)
  }
  return params
