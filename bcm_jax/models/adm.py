"""ADM U-Net (Dhariwal & Nichol, 2021) with a time embedding of the end level.

Includes the variants of BCM (Li & He, 2024): additive or scale-shift
conditioning, QKV normalization, dropout only at low resolutions, and a second
time embedding for the end level u; and of CTM (Kim et al., 2024): the embedding
of u enters every residual block. Sub-module names follow the published state
dicts (`input_blocks.4.0.in_layers.2` is `input_blocks_4_0/in_layers_2`), so
that weights are converted by renaming.

EDM's DhariwalUNet (Karras et al., 2022) computes the same function with the
settings `DHARIWAL`: c_noise is ln(t) / 4 instead of 250 ln t, groups have at
least four channels, and augmentation labels are added to the noise embedding.
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
  """Residual block of ADM (BigGAN residual block).

  GN, SiLU, conv; the embedding; GN, SiLU, dropout, zero-initialized conv; skip.

  Attributes:
    features: number of output channels.
    dropout: dropout rate.
    resample: None, 'down' (2x2 mean) or 'up' (nearest neighbor), in both paths.
    scale_shift: condition by GN(h) * (1 + scale) + shift; False adds the
      embedding.
    groups: (maximum number of groups, minimum channels per group).
    dtype: dtype of the convolutions; None follows input and parameters.
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
  """Downsampling without resblock_updown: 3x3 convolution with stride 2.

  Without `conv` the 2x2 mean.
  """

  dtype: Dtype | None = None
  conv: bool = True

  @nn.compact
  def __call__(self, x):
    if not self.conv:
      return resampling.halve(x)
    return layers.conv(
        x, x.shape[-1], 3, stride=2, name="op", dtype=self.dtype
    )


class Upsample(nn.Module):
  """Upsampling without resblock_updown: nearest neighbor, 3x3 convolution.

  Without `conv` only the nearest neighbor.
  """

  dtype: Dtype | None = None
  conv: bool = True

  @nn.compact
  def __call__(self, x):
    if not self.conv:
      return resampling.double(x)
    return layers.conv(
        resampling.double(x), x.shape[-1], 3, name="conv", dtype=self.dtype
    )


class ADM(nn.Module):
  """ADM U-Net F(x, c_noise, c_noise_end, labels).

  Attributes:
    model_channels: base width; 192 for ImageNet-64.
    out_channels: number of output channels.
    channel_mult: width of each level, in units of model_channels.
    num_res_blocks: residual blocks per level (one more in the decoder).
    attention_resolutions: resolutions in pixels with attention.
    num_head_channels: channels per attention head; None uses num_heads.
    num_heads: number of attention heads if num_head_channels is None.
    num_heads_upsample: the same in the decoder; None is num_heads.
    num_classes: number of classes; None is unconditional.
    two_time: add a time embedding for the end level u (BCM, CTM). False for a
      denoiser or a consistency model.
    end_branch: how the embedding of u is combined: 'align' by a bias-free dense
      layer with that of t (BCM), 'blocks' in every residual block (CTM).
    augment_dim: size of EDM's augmentation labels; 0 disables them.
    channel_mult_emb: width of the embedding, in units of model_channels.
    resblock_updown: resample inside residual blocks; False uses convolutions.
    conv_resample: without resblock_updown, resample with convolutions; False
      uses the 2x2 mean and the nearest neighbor only.
    use_scale_shift_norm: scale-shift conditioning (OpenAI's CM); False is
      additive (iCT, BCM).
    qkv_norm: normalize q, k and v, which stabilizes consistency training.
    dropout: dropout rate above `dropout_resolution`.
    low_res_dropout: dropout rate at and below `dropout_resolution`; None uses
      `dropout` everywhere. Resampling blocks belong to their input level.
    dropout_resolution: resolution in pixels, see `low_res_dropout`.
    num_groups: groups of every GroupNorm; 32 in the published networks. With
      one channel per group, GroupNorm removes an additive embedding, so small
      networks need fewer groups.
    min_group_channels: minimum channels per group; reduces the groups.
    dtype: dtype of the convolutions in the torso (bfloat16 on accelerators);
      None follows input and parameters. Embeddings, norm statistics, softmax
      and the head use at least float32.
    float32_levels: number of levels, from the finest, that are computed in
      float32 or wider despite dtype. Consistency residuals, differences of
      nearly equal outputs, need the finest level; denoisers need none.
    precision: precision of convolutions and matrix products of float32 arrays;
      'default' is one bfloat16 pass on TPUs and TF32 on GPUs.
    attention: attention implementation for bfloat16.
    remat: recompute residual blocks in the backward pass to save memory.
  """

  model_channels: int = 192
  out_channels: int = 3
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_res_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (16, 8)
  num_head_channels: int | None = 64
  num_heads: int = 4
  num_heads_upsample: int | None = None
  num_classes: int | None = None
  two_time: bool = False
  end_branch: Literal["align", "blocks"] = "align"
  augment_dim: int = 0
  channel_mult_emb: int = 4
  resblock_updown: bool = True
  conv_resample: bool = True
  use_scale_shift_norm: bool = False
  qkv_norm: bool = True
  dropout: float = 0.0
  low_res_dropout: float | None = None
  dropout_resolution: int = 16
  num_groups: int = 32
  min_group_channels: int = 1
  dtype: layers.Precision | None = None
  float32_levels: int = 1
  precision: layers.MatmulPrecision = "highest"
  attention: layers.Attention = "xla"
  remat: bool = False

  # {layer of the end-level embedding: layer of the first}, and the align layer.
  SECOND_TIME = {f"time_embed_end_{k}": f"time_embed_{k}" for k in "02"}
  ALIGN = "time_embed_align"

  @staticmethod
  def last_layer(tree):
    """Returns the last-layer kernel for CTM's adaptive weights.

    The second convolution of the last residual block, from parameters or
    gradients.
    """
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
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    with jax.default_matmul_precision(self.precision):
      emb = self._embedding(c_noise, c_noise_end, labels, augment_labels)
      h = x if self._dtype(0) is None else x.astype(self.dtype)
      h = self._torso(h, emb, dropout_keys).astype(dtype)
      h = nn.silu(layers.group_norm(h, *self._groups, name="out_0"))
      return layers.conv(h, self.out_channels, 3, name="out_2", zero=True)

  def _dtype(self, level: int):
    """Returns the dtype of a level; None follows input and parameters."""
    return None if level < self.float32_levels else self.dtype

  @property
  def _groups(self):
    return self.num_groups, self.min_group_channels

  def _embedding(self, c_noise, c_noise_end, labels, augment_labels):
    """Returns (emb, emb_end) [B, width], at least float32.

    emb_end is None unless end_branch is 'blocks'.
    """
    width = self.channel_mult_emb * self.model_channels

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
      # Full precision, so that the initialization [I | 0] is exact.
      emb = layers.linear(
          both, width, name="time_embed_align", use_bias=False,
          precision=_HIGHEST,
      )
    if self.num_classes is not None:
      emb += layers.label_embedding(
          labels, self.num_classes, width, name="label_emb"
      )
    return emb, emb_end

  def _res(
      self, h, emb, dropout_keys, features, size, level, name, resample=None
  ):
    block = nn.remat(ResBlock) if self.remat else ResBlock
    return block(
        features, self._rate(size), resample, self.use_scale_shift_norm,
        self._groups, self._dtype(level), name=name,
    )(h, *emb, dropout_keys)

  def _attend(self, h, level, name):
    heads = self.num_heads
    if name.startswith("output") and self.num_heads_upsample is not None:
      heads = self.num_heads_upsample
    if self.num_head_channels is not None:
      heads = h.shape[-1] // self.num_head_channels
    if not heads:  # Narrower than one head: no attention, as in EDM.
      return h
    return layers.AttentionBlock(
        heads, self._groups, self.qkv_norm, self._dtype(level), self.attention,
        name=name,
    )(h)

  def _torso(self, h, emb, dropout_keys):
    """Applies encoder, middle block and decoder.

    [B, H, W, C] -> [B, H, W, model_channels].
    """
    skips = self._encoder(h, emb, dropout_keys)
    h = skips[-1]
    size, level = h.shape[1], len(self.channel_mult) - 1
    for index in ("0", "1", "2"):
      name = f"middle_block_{index}"
      if index == "1":
        h = self._attend(h, level, name)
      else:
        h = self._res(h, emb, dropout_keys, h.shape[-1], size, level, name)
    return self._decoder(h, skips, emb, dropout_keys)

  def _encoder(self, h, emb, dropout_keys):
    """Returns the outputs of all input blocks, first to last."""
    size = h.shape[1]
    h = layers.conv(
        h, self.model_channels * self.channel_mult[0], 3,
        name="input_blocks_0_0", dtype=self._dtype(0),
    )
    skips = [h]
    for level, mult in enumerate(self.channel_mult):
      for _ in range(self.num_res_blocks):
        name = f"input_blocks_{len(skips)}"
        h = self._res(
            h, emb, dropout_keys, self.model_channels * mult, size, level,
            f"{name}_0",
        )
        if size in self.attention_resolutions:
          h = self._attend(h, level, f"{name}_1")
        skips.append(h)
      layers.sow_level(self, level, h)
      if level == len(self.channel_mult) - 1:
        break
      name = f"input_blocks_{len(skips)}_0"
      if self.resblock_updown:
        h = self._res(
            h, emb, dropout_keys, h.shape[-1], size, level, name, "down"
        )
      else:
        h = Downsample(
            self._dtype(level), self.conv_resample, name=name
        )(h)
      skips.append(h)
      size //= 2
    return skips

  def _decoder(self, h, skips, emb, dropout_keys):
    """Applies the decoder; skips are used from last to first."""
    size, skips, index = h.shape[1], list(skips), 0
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      for block in range(self.num_res_blocks + 1):
        name, part = f"output_blocks_{index}", 1
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._res(
            h, emb, dropout_keys, self.model_channels * mult, size, level,
            f"{name}_0",
        )
        if size in self.attention_resolutions:
          h, part = self._attend(h, level, f"{name}_1"), 2
        if level and block == self.num_res_blocks:
          name = f"{name}_{part}"
          if self.resblock_updown:
            h = self._res(
                h, emb, dropout_keys, h.shape[-1], size, level, name, "up"
            )
          else:
            h = Upsample(
                self._dtype(level), self.conv_resample, name=name
            )(h)
          size *= 2
        index += 1
    return h

  def _rate(self, size: int) -> float:
    low = size <= self.dropout_resolution and self.low_res_dropout is not None
    return self.low_res_dropout if low else self.dropout


# Settings of EDM's DhariwalUNet for ImageNet-64, with c_noise = ln(t) / 4.
DHARIWAL = dict(
    attention_resolutions=(32, 16, 8), use_scale_shift_norm=True,
    qkv_norm=False, min_group_channels=4, dropout=0.1,
)
