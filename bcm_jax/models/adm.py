"""The ADM U-Net in the forms that consistency methods train on ImageNet-64.

Dhariwal & Nichol (2021), with the changes of Li & He (BCM, 2024): additive or
scale-shift conditioning, normalised QKV, dropout at low resolutions only and a
second time branch for the end level u; and CTM's end level in every block
(Kim et al., 2024). Sub-modules carry the names of the published state dicts
(`input_blocks.4.0.in_layers.2` is `input_blocks_4_0/in_layers_2` here), so that
weights convert by renaming.

EDM's DhariwalUNet (Karras et al., 2022) is the same function under other
names, `DHARIWAL` its settings: 250 ln t becomes ln(t) / 4, groups have at least
four channels, and labels of the augmentation come in beside the noise level.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import embeddings
from bcm_jax.models import layers
from bcm_jax.models import resampling

Dtype = Any
_HIGHEST = jax.lax.Precision.HIGHEST


class ResBlock(nn.Module):
  """GN-SiLU-conv, embedding, GN-SiLU-dropout-conv(0), plus the skip.

  Attributes:
    features: output channels.
    resample: None, 'down' (2x2 mean) or 'up' (nearest x2) of both paths.
    scale_shift: condition by GN(h) * (1 + scale) + shift instead of by adding.
    groups: most groups of a norm, fewest channels of a group.
  """

  features: int
  dropout: float = 0.0
  resample: str | None = None
  scale_shift: bool = False
  groups: tuple[int, int] = (32, 1)
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x, emb, emb_end=None, dropout_keys=None):
    resample = resampling.BY_NAME[self.resample]
    h = nn.silu(layers.group_norm(x, *self.groups, name="in_layers_0"))
    h, x = resample(h), resample(x)
    h = layers.conv(h, self.features, 3, name="in_layers_2", dtype=self.dtype)

    width = self.features * (2 if self.scale_shift else 1)
    emb = layers.linear(nn.silu(emb), width, name="emb_layers_1")
    if emb_end is not None:
      emb += layers.linear(nn.silu(emb_end), width, name="emb_layers_s_1")
    emb = emb.astype(h.dtype)[:, None, None, :]
    if self.scale_shift:
      scale, shift = jnp.split(emb, 2, axis=-1)
      h = layers.group_norm(h, *self.groups, name="out_layers_0")
      h = h * (1 + scale) + shift
    else:
      h = layers.group_norm(h + emb, *self.groups, name="out_layers_0")
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
        resampling.double(x), x.shape[-1], 3, name="conv", dtype=self.dtype
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
    two_time: second time branch for the end level. False is the plain
      consistency model or denoiser.
    end_branch: where that branch goes: 'align' mixes it with the first by a
      bias-free layer (BCM), 'blocks' adds it in every residual block (CTM).
    augment_dim: width of EDM's augmentation labels; 0 for none.
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
    min_group_channels: fewest channels of a group, at the cost of groups.
    dtype: dtype of the convolutions in the torso (bfloat16 on accelerators);
      None follows input and parameters. Embeddings, norms' statistics,
      softmax and the head stay in float32 or wider.
    attention: implementation of attention in bfloat16.
    remat: recompute residual blocks in the backward pass, to save memory.
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
  end_branch: Literal["align", "blocks"] = "align"
  augment_dim: int = 0
  resblock_updown: bool = True
  use_scale_shift_norm: bool = False
  qkv_norm: bool = True
  dropout: float = 0.0
  low_res_dropout: float | None = None
  dropout_resolution: int = 16
  num_groups: int = 32
  min_group_channels: int = 1
  dtype: layers.Precision | None = None
  attention: layers.Attention = "xla"
  remat: bool = False

  # The second branch's layers by those of the first, and the align layer.
  SECOND_TIME = {f"time_embed_end_{k}": f"time_embed_{k}" for k in "02"}
  ALIGN = "time_embed_align"

  @staticmethod
  def last_layer(tree):
    """Of a tree like its parameters, the last block's second convolution."""
    blocks = [k for k in tree if k.startswith("output_blocks_")]
    last = max(int(k.split("_")[2]) for k in blocks)
    return tree[f"output_blocks_{last}_0"]["out_layers_3"]["kernel"]

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
    emb = self._embedding(c_noise, c_noise_end, labels, augment_labels)
    wide = jnp.promote_types(jnp.float32, x.dtype)
    h = x if self.dtype is None else x.astype(self.dtype)
    h = self._torso(h, emb, dropout_keys)
    h = nn.silu(layers.group_norm(h.astype(wide), *self._groups, name="out_0"))
    return layers.conv(h, self.out_channels, 3, name="out_2", zero=True)

  @property
  def _groups(self):
    return self.num_groups, self.min_group_channels

  def _embedding(self, c_noise, c_noise_end, labels, augment_labels):
    """(emb, emb_end) [B, 4 model_channels], float32 or wider.

    emb_end is None unless the end level goes into the blocks on its own.
    """
    width = 4 * self.model_channels

    def branch(value, name):
      e = embeddings.sinusoidal_embedding(value, self.model_channels)
      if self.augment_dim and name == "time_embed":
        e += layers.augment_embedding(
            augment_labels, self.augment_dim, self.model_channels,
            name="map_augment", kernel_init=nn.initializers.zeros_init(),
        )
      e = layers.linear(e, width, name=f"{name}_0", precision=_HIGHEST)
      return layers.linear(
          nn.silu(e), width, name=f"{name}_2", precision=_HIGHEST
      )

    emb, emb_end = branch(c_noise, "time_embed"), None
    if self.two_time and self.end_branch == "blocks":
      emb_end = branch(c_noise_end, "time_embed_s")
    elif self.two_time:
      both = jnp.concatenate([emb, branch(c_noise_end, "time_embed_end")], -1)
      # In full precision, so that the start [I | 0] of fine-tuning is exact.
      emb = layers.linear(
          both, width, name="time_embed_align", use_bias=False,
          precision=_HIGHEST,
      )
    if self.num_classes is not None:
      emb += layers.label_embedding(
          labels, self.num_classes, width, name="label_emb"
      )
    return emb, emb_end

  def _res(self, h, emb, dropout_keys, features, size, name, resample=None):
    block = nn.remat(ResBlock) if self.remat else ResBlock
    return block(
        features, self._rate(size), resample, self.use_scale_shift_norm,
        self._groups, self.dtype, name=name,
    )(h, *emb, dropout_keys)

  def _attend(self, h, name):
    heads = self.num_heads
    if self.num_head_channels is not None:
      heads = h.shape[-1] // self.num_head_channels
    if not heads:  # Narrower than a head: no attention, as in EDM.
      return h
    return layers.AttentionBlock(
        heads, self._groups, self.qkv_norm, self.dtype, self.attention,
        name=name,
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
      layers.sow_level(self, level, h)
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


# EDM's DhariwalUNet on ImageNet-64; its conditioning value is ln(t) / 4.
DHARIWAL = dict(
    attention_resolutions=(32, 16, 8), use_scale_shift_norm=True,
    qkv_norm=False, min_group_channels=4, dropout=0.1,
)
