"""The magnitude-preserving U-Net of EDM2 (configuration G).

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (2024), section 2 and appendix B. No layer has a bias, no norm has
statistics over positions: every operation keeps the expected magnitude of what
passes, and kernels are normalised as they are used. Sub-modules carry the names
of the published state dicts (`unet.enc.64x64_block0.conv_res0.weight` is
`enc_64x64_block0/conv_res0/kernel` here), so that weights convert by renaming;
queries, keys and values alone change places, see `Block`.

Training has one duty that a loss cannot see: `normalize_weights` after every
step of the optimiser. Without it kernels grow and the effective learning rate
decays.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import layers
from bcm_jax.models import mp_layers
from bcm_jax.models import resampling


def normalize_weights(params: Any) -> Any:
  """Forced weight normalisation: every kernel back to unit RMS an output.

  To be applied after every step of the optimiser, never to averages of
  parameters (eq. 66). It hardly changes the network, which normalises
  its kernels anyway (up to 1e-4 of them), but keeps kernels where a step of the
  optimiser has the size it is meant to have.

  Args:
    params: parameters of an `EDM2`, or any tree that holds them. Kernels are
      the leaves named 'kernel'; gains (emb_gain, out_gain) and the constants
      of the Fourier features have other names and pass.

  Returns:
    A tree of the same structure, shapes and dtypes.
  """

  def one(path, leaf):
    name = getattr(path[-1], "key", None) if path else None
    return (
      mp_layers.unit_kernel(leaf).astype(leaf.dtype)
      if name == "kernel"
      else leaf
    )

  return jax.tree_util.tree_map_with_path(one, params)


class Block(nn.Module):
  """Encoder or decoder block: residual branch, then attention.

  The encoder's block widens its input first and normalises every pixel; the
  decoder's widens the skip alone. Channels of attn_qkv are thirds [Q | K | V],
  head-major inside each. In the published checkpoints they are
  (head, channel, qkv): the triple lies innermost.

  Attributes:
    features: output channels.
    decoder: the decoder's flavour.
    resample: None, 'down' (2x2 mean) or 'up' (nearest x2) of the input.
    num_heads: heads of attention over positions; 0 is none.
    dropout: rate, in the middle of the residual branch.
    res_balance: share of the residual branch.
    attn_balance: share of attention.
    clip_act: bound of the output's absolute value; None does not clip.
    attention: implementation of attention in bfloat16.
  """

  features: int
  decoder: bool = False
  resample: str | None = None
  num_heads: int = 0
  dropout: float = 0.0
  res_balance: float = 0.3
  attn_balance: float = 0.3
  clip_act: float | None = 256.0
  attention: layers.Attention = "xla"

  @nn.compact
  def __call__(self, x, emb, dropout_keys=None):
    x = resampling.BY_NAME[self.resample](x)
    if not self.decoder:
      x = layers.unit_rms(self._widen(x))
    y = mp_layers.MPConv(self.features, 3, name="conv_res0")(mp_layers.silu(x))
    gain = self.param("emb_gain", nn.initializers.zeros_init(), ())
    scale = 1 + mp_layers.MPConv(self.features, name="emb_linear")(emb, gain)
    y = mp_layers.silu(y * scale.astype(y.dtype)[:, None, None, :])
    y = layers.Dropout(self.dropout)(y, dropout_keys)
    y = mp_layers.MPConv(self.features, 3, name="conv_res1")(y)
    if self.decoder:
      x = self._widen(x)
    x = mp_layers.add(x, y, self.res_balance)
    if self.num_heads:
      x = mp_layers.add(x, self._attend(x), self.attn_balance)
    if self.clip_act is not None:
      x = jnp.clip(x, -self.clip_act, self.clip_act)
    return x

  def _widen(self, x):
    if x.shape[-1] == self.features:
      return x
    return mp_layers.MPConv(self.features, 1, name="conv_skip")(x)

  def _attend(self, x):
    b, h, w, c = x.shape
    qkv = mp_layers.MPConv(3 * c, 1, name="attn_qkv")(x)
    qkv = qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
    qkv = layers.unit_rms(qkv)  # The values too.
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    y = layers.attention(q, k, v, self.attention)
    return mp_layers.MPConv(c, 1, name="attn_proj")(y.reshape(x.shape))


class EDM2(nn.Module):
  """EDM2's U-Net F(x, c_noise, labels) and its log-variance head.

  The published sizes have model_channels of 64 (XXS), 128 (XS), 192 (S),
  256 (M), 320 (L), 384 (XL) and 448 (XXL) with all else as by default.

  Attributes:
    model_channels: channels at full resolution; 192 is EDM2-S.
    out_channels: channels of the output, those of the image.
    channel_mult: width of each level, in model_channels.
    num_res_blocks: blocks a level (the decoder has one more).
    attention_resolutions: resolutions (pixels a side) that get attention, as
      the first block of the decoder always does.
    num_head_channels: channels a head, rounded to a whole number of heads;
      levels narrower than one head go without attention.
    num_classes: classes of the label embedding; None is unconditional.
    label_balance: share of the label in the embedding.
    concat_balance: share of the skip connections in the decoder's inputs.
    res_balance: share of the residual branches.
    attn_balance: share of attention.
    clip_act: bound of activations; None does not clip.
    dropout: rate in every block.
    logvar_channels: Fourier features of the log-variance head.
    dtype: dtype of the torso (bfloat16 on accelerators); None follows the
      input. Embeddings, the norms of kernels and pixels, softmax and the last
      convolution stay in float32 or wider.
    attention: implementation of attention in bfloat16.
    remat: recompute blocks in the backward pass, to save memory.
  """

  model_channels: int = 192
  out_channels: int = 3
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_res_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (16, 8)
  num_head_channels: int = 64
  num_classes: int | None = None
  label_balance: float = 0.5
  concat_balance: float = 0.5
  res_balance: float = 0.3
  attn_balance: float = 0.3
  clip_act: float | None = 256.0
  dropout: float = 0.0
  logvar_channels: int = 128
  dtype: layers.Precision | None = None
  attention: layers.Attention = "xla"
  remat: bool = False

  two_time = False  # One noise level: not for jumps to any end level.

  @staticmethod
  def project(params: Any) -> Any:
    """What must follow every update: `normalize_weights`."""
    return normalize_weights(params)

  def setup(self):
    self.logvar_fourier = mp_layers.MPFourier(self.logvar_channels)
    self.logvar_linear = mp_layers.MPConv(1)

  def logvar(self, c_noise: jax.Array) -> jax.Array:
    """Log-variance u(sigma) of the loss, for training only (eq. 21).

    The loss of a pixel is weight / exp(u) * error^2 + u.

    Args:
      c_noise: [B] conditioning value ln(sigma) / 4.

    Returns:
      [B], float32 or wider. `apply` it by method='logvar'.
    """
    return self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]

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
      c_noise: [B] conditioning value ln(sigma) / 4 of the level t.
      c_noise_end: None; the network has one level.
      labels: needed iff num_classes. [B] int classes, of which -1 (and any
        other outside 0 .. num_classes - 1) is no class; or [B, num_classes]
        weights of classes, one-hot as a rule.
      dropout_keys: [B] keys, one an example; None switches dropout off.

    Returns:
      [B, H, W, out_channels], float32 or wider; 0 at the start.

    Raises:
      ValueError: for an input that does not fit the attributes, or widths
        that do not divide into heads.
    """
    self._check(x, c_noise_end, labels)
    if self.is_initializing():
      self.logvar(c_noise)  # So that `init` makes its parameters too.
    emb = self._embedding(c_noise, labels)
    wide = jnp.promote_types(jnp.float32, x.dtype)
    h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    h = h.astype(wide if self.dtype is None else self.dtype)
    skips = self._encoder(h, emb, dropout_keys)
    h = self._decoder(skips, emb, dropout_keys).astype(wide)
    gain = self.param("out_gain", nn.initializers.zeros_init(), ())
    return mp_layers.MPConv(self.out_channels, 3, name="out_conv")(h, gain)

  def _check(self, x, c_noise_end, labels):
    if c_noise_end is not None:
      raise ValueError("EDM2 has one noise level; c_noise_end must be None")
    layers.check_inputs(self, x, c_noise_end, labels)
    if labels is not None and labels.shape[1:] not in ((), (self.num_classes,)):
      raise ValueError(
        f"labels of shape {labels.shape}; expected [B] classes or "
        f"[B, {self.num_classes}] weights"
      )

  def _embedding(self, c_noise, labels):
    """Embedding [B, widest level] of level and class, float32 or wider."""
    width = self.model_channels * max(self.channel_mult)
    features = self.model_channels * self.channel_mult[0]
    emb = mp_layers.MPFourier(features, name="emb_fourier")(c_noise)
    emb = mp_layers.MPConv(width, name="emb_noise")(emb)
    if labels is not None:
      if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, self.num_classes, dtype=emb.dtype)
      labels = labels.astype(emb.dtype) * math.sqrt(self.num_classes)
      label = mp_layers.MPConv(width, name="emb_label")(labels)
      emb = mp_layers.add(emb, label, self.label_balance)
    return mp_layers.silu(emb)

  def _block(self, h, emb, keys, part, features, attend=False, resample=None):
    """One block of 'enc' or 'dec', named by the resolution it works at."""
    size = h.shape[1]
    if resample:
      size = size // 2 if resample == "down" else size * 2
    side, kind = part.split("_")
    attend = attend or (
      kind.startswith("block") and size in self.attention_resolutions
    )
    heads = features // self.num_head_channels if attend else 0
    if heads and features % heads:
      raise ValueError(
        f"{features} channels at {size}x{size} do not divide into {heads} "
        f"heads, as num_head_channels={self.num_head_channels} asks"
      )
    block = nn.remat(Block) if self.remat else Block
    return block(
      features,
      side == "dec",
      resample,
      heads,
      self.dropout,
      self.res_balance,
      self.attn_balance,
      self.clip_act,
      self.attention,
      name=f"{side}_{size}x{size}_{kind}",
    )(h, emb, keys)

  def _encoder(self, h, emb, keys):
    """Outputs of all blocks of the encoder, first to last."""
    size = h.shape[1]
    width = self.model_channels * self.channel_mult[0]
    skips = [mp_layers.MPConv(width, 3, name=f"enc_{size}x{size}_conv")(h)]
    for level, mult in enumerate(self.channel_mult):
      if level:
        width = skips[-1].shape[-1]
        skips.append(
          self._block(skips[-1], emb, keys, "enc_down", width, resample="down")
        )
      for i in range(self.num_res_blocks):
        skips.append(
          self._block(
            skips[-1], emb, keys, f"enc_block{i}", self.model_channels * mult
          )
        )
      layers.sow_level(self, level, skips[-1])
    return skips

  def _decoder(self, skips, emb, keys):
    """Consumes the encoder's outputs last to first."""
    h, skips = skips[-1], list(skips)
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      width = h.shape[-1]
      if level == len(self.channel_mult) - 1:
        h = self._block(h, emb, keys, "dec_in0", width, attend=True)
        h = self._block(h, emb, keys, "dec_in1", width)
      else:
        h = self._block(h, emb, keys, "dec_up", width, resample="up")
      for i in range(self.num_res_blocks + 1):
        h = mp_layers.concatenate(h, skips.pop(), self.concat_balance)
        h = self._block(
          h, emb, keys, f"dec_block{i}", self.model_channels * mult
        )
    return h
