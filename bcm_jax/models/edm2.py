"""Magnitude-preserving U-Net of EDM2 (configuration G).

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (2024), section 2 and appendix B. Every operation preserves the expected
magnitude of its input, kernels are normalized in the forward pass, and there
are no biases and no group norms. Sub-module names follow the published state
dicts (`unet.enc.64x64_block0.conv_res0.weight` is
`enc_64x64_block0/conv_res0/kernel`), so that weights are converted by renaming;
only the order of queries, keys and values differs, see `Block`.

Training must call `normalize_weights` after every optimizer step (forced weight
normalization). Otherwise the kernels grow and the effective learning rate
decays.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes
from bcm_jax.models import layers
from bcm_jax.models import mp_layers
from bcm_jax.models import resampling


def normalize_weights(params: Any) -> Any:
  """Forced weight normalization: scales kernels to unit RMS per output channel.

  Apply it after every optimizer step, never to averaged parameters (eq. 66).
  The network output hardly changes (about 1e-4), because the forward pass
  normalizes kernels too; it prevents a decay of the effective learning rate.

  Args:
    params: parameters of an `EDM2`, or a tree that contains them. Normalizes
      the leaves named 'kernel'; gains (emb_gain, out_gain) and the constants of
      the Fourier features are unchanged.

  Returns:
    A tree with the same structure, shapes and dtypes.
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
  """Encoder or decoder block: residual branch, then self-attention.

  An encoder block applies conv_skip to its input and normalizes every pixel
  (pixel norm); a decoder block applies conv_skip only to the skip path. The
  channels of attn_qkv are thirds [Q | K | V], head-major within each; in the
  published checkpoints their order is (head, channel, qkv).

  Attributes:
    features: number of output channels.
    decoder: decoder block; False is an encoder block.
    resample: None, 'down' (2x2 mean) or 'up' (nearest neighbor) of the input.
    num_heads: number of attention heads; 0 disables attention.
    dropout: dropout rate in the residual branch.
    res_balance: weight of the residual branch, in [0, 1].
    attn_balance: weight of attention, in [0, 1].
    clip_act: bound of the absolute output; None does not clip.
    attention: attention implementation for bfloat16.
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
    qkv = layers.unit_rms(qkv)  # EDM2 normalizes v as well.
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    y = layers.attention(q, k, v, self.attention)
    return mp_layers.MPConv(c, 1, name="attn_proj")(y.reshape(x.shape))


class EDM2(nn.Module):
  """EDM2 U-Net F(x, c_noise, labels) with a log-variance head.

  The published sizes use model_channels of 64 (XXS), 128 (XS), 192 (S),
  256 (M), 320 (L), 384 (XL) and 448 (XXL), and the defaults otherwise.

  Attributes:
    model_channels: base width; 192 is EDM2-S.
    out_channels: number of output channels.
    channel_mult: width of each level, in units of model_channels.
    channel_mult_noise: width of the noise features, in units of model_channels;
      None is that of the first level.
    channel_mult_emb: width of the embedding, in units of model_channels; None
      is that of the widest level.
    num_res_blocks: blocks per level (one more in the decoder).
    attention_resolutions: resolutions in pixels with attention; the first
      decoder block always has it.
    num_head_channels: channels per attention head, rounded to an integer number
      of heads; levels narrower than one head have no attention.
    num_classes: number of classes; None is unconditional.
    label_balance: weight of the label in the embedding.
    concat_balance: weight of the skip connections in the decoder inputs.
    res_balance: weight of the residual branches.
    attn_balance: weight of attention.
    clip_act: bound of the activations; None does not clip.
    dropout: dropout rate of every block.
    logvar_channels: Fourier features of the log-variance head.
    dtype: dtype of the torso (bfloat16 on accelerators); None follows the
      input. Embeddings, kernel and pixel norms, softmax and the last
      convolution use at least float32.
    float32_levels: number of levels, from the finest, that are computed in
      float32 or wider despite dtype. Consistency residuals, differences of
      nearly equal outputs, need the finest level; denoisers need none.
    precision: precision of convolutions and matrix products of float32 arrays;
      'default' is one bfloat16 pass on TPUs and TF32 on GPUs.
    attention: attention implementation for bfloat16.
    remat: recompute blocks in the backward pass to save memory.
  """

  model_channels: int = 192
  out_channels: int = 3
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  channel_mult_noise: int | None = None
  channel_mult_emb: int | None = None
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
  float32_levels: int = 1
  precision: layers.MatmulPrecision = "highest"
  attention: layers.Attention = "xla"
  remat: bool = False

  two_time = False  # One noise level only: not a flow map.

  @staticmethod
  def project(params: Any) -> Any:
    """Projects updated parameters, see `normalize_weights`."""
    return normalize_weights(params)

  def setup(self):
    self.logvar_fourier = mp_layers.MPFourier(self.logvar_channels)
    self.logvar_linear = mp_layers.MPConv(1)

  def logvar(self, c_noise: jax.Array) -> jax.Array:
    """Computes the log-variance u(sigma) of the loss, for training (eq. 21).

    The loss per pixel is weight / exp(u) * error^2 + u. Call it with
    `apply(..., method='logvar')`.

    Args:
      c_noise: [B] noise conditioning ln(sigma) / 4.

    Returns:
      [B], at least float32.
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
      c_noise: [B] noise conditioning ln(t) / 4.
      c_noise_end: must be None; the network has one noise level.
      labels: required iff num_classes. [B] int class labels, where -1 (or any
        value outside 0 .. num_classes - 1) is no class; or class weights
        [B, num_classes], usually one-hot.
      dropout_keys: [B] PRNG keys, one per example; None disables dropout.

    Returns:
      [B, H, W, out_channels], at least float32; 0 at initialization.

    Raises:
      ValueError: the inputs do not match the attributes, or a width is not a
        multiple of the number of heads.
    """
    self._check(x, c_noise_end, labels)
    if self.is_initializing():
      self.logvar(c_noise)  # Creates its parameters in `init`.
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    with jax.default_matmul_precision(self.precision):
      emb = self._embedding(c_noise, labels)
      h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
      skips = self._encoder(h.astype(dtype), emb, dropout_keys)
      h = self._decoder(skips, emb, dropout_keys).astype(dtype)
      gain = self.param("out_gain", nn.initializers.zeros_init(), ())
      return mp_layers.MPConv(self.out_channels, 3, name="out_conv")(h, gain)

  def _cast(self, h, level: int):
    """Casts the input of a block to the dtype of a level."""
    if self.dtype is None or level < self.float32_levels:
      return dtypes.at_least_float32(h)
    return h.astype(self.dtype)

  def _check(self, x, c_noise_end, labels):
    if c_noise_end is not None:
      raise ValueError("c_noise_end: got an array, expected None with EDM2")
    layers.check_inputs(self, x, c_noise_end, labels)
    if labels is not None and labels.shape[1:] not in ((), (self.num_classes,)):
      raise ValueError(
        f"labels: got shape {labels.shape}, expected [B] class labels or "
        f"[B, {self.num_classes}] class weights"
      )

  def _embedding(self, c_noise, labels):
    """Returns the embedding [B, width] of noise level and class."""
    mult, mult_noise = self.channel_mult_emb, self.channel_mult_noise
    mult = max(self.channel_mult) if mult is None else mult
    mult_noise = self.channel_mult[0] if mult_noise is None else mult_noise
    width, noise = (self.model_channels * m for m in (mult, mult_noise))
    emb = mp_layers.MPFourier(noise, name="emb_fourier")(c_noise)
    emb = mp_layers.MPConv(width, name="emb_noise")(emb)
    if labels is not None:
      if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, self.num_classes, dtype=emb.dtype)
      labels = labels.astype(emb.dtype) * math.sqrt(self.num_classes)
      label = mp_layers.MPConv(width, name="emb_label")(labels)
      emb = mp_layers.add(emb, label, self.label_balance)
    return mp_layers.silu(emb)

  def _block(
    self, h, emb, keys, level, part, features, attend=False, resample=None
  ):
    """Applies one block, named by its output resolution."""
    h, size = self._cast(h, level), h.shape[1]
    if resample:
      size = size // 2 if resample == "down" else size * 2
    side, kind = part.split("_")
    attend = attend or (
      kind.startswith("block") and size in self.attention_resolutions
    )
    heads = features // self.num_head_channels if attend else 0
    if heads and features % heads:
      raise ValueError(
        f"num_head_channels: got {self.num_head_channels} ({heads} heads), "
        f"expected heads that divide the {features} channels at {size}x{size}; "
        "change it"
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
    """Returns the outputs of all encoder blocks, first to last."""
    size = h.shape[1]
    width = self.model_channels * self.channel_mult[0]
    conv = mp_layers.MPConv(width, 3, name=f"enc_{size}x{size}_conv")
    skips = [conv(self._cast(h, 0))]
    for level, mult in enumerate(self.channel_mult):
      if level:
        width = skips[-1].shape[-1]
        skips.append(
          self._block(
            skips[-1], emb, keys, level, "enc_down", width, resample="down"
          )
        )
      for i in range(self.num_res_blocks):
        skips.append(
          self._block(
            skips[-1], emb, keys, level, f"enc_block{i}",
            self.model_channels * mult,
          )
        )
      layers.sow_level(self, level, skips[-1])
    return skips

  def _decoder(self, skips, emb, keys):
    """Applies the decoder; skips are used from last to first."""
    h, skips = skips[-1], list(skips)
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      width = h.shape[-1]
      if level == len(self.channel_mult) - 1:
        h = self._block(h, emb, keys, level, "dec_in0", width, attend=True)
        h = self._block(h, emb, keys, level, "dec_in1", width)
      else:
        h = self._block(h, emb, keys, level, "dec_up", width, resample="up")
      for i in range(self.num_res_blocks + 1):
        h = mp_layers.concatenate(h, skips.pop(), self.concat_balance)
        h = self._block(
          h, emb, keys, level, f"dec_block{i}", self.model_channels * mult
        )
    return h
