"""Tensor names of NVIDIA's EDM2 state dicts for `EDM2`."""

import math
import re

import numpy as np

from bcm_jax.interop import layouts
from bcm_jax.models import edm2

Tensors = dict[str, np.ndarray]

NAME = "edm2"
NETWORK = edm2.EDM2
PREFIXES = ("",)
# A tensor that every network of the family has.
MARKER = "unet.out_gain"
# Attributes that the tensors do not determine.
ASSUMED = (
    "num_head_channels", "label_balance", "concat_balance", "res_balance",
    "attn_balance", "clip_act",
)


def entry(network, path, shape) -> layouts.Entry:
  """Maps a parameter to its published tensor.

  enc_8x8_block0/conv_res0/kernel -> unet.enc.8x8_block0.conv_res0.weight.
  """
  *modules, leaf = path
  name, layout = layouts.torch_leaf(leaf, len(shape))
  if modules and modules[-1] == "attn_qkv":
    channels = shape[-1] // 3
    heads = channels // network.num_head_channels
    layout = layouts.chain(layout, layouts.interleaved_qkv(channels, heads))
  parts = [re.sub(r"^(enc|dec)_", r"\1.", m) for m in modules]
  prefix = [] if parts and parts[0].startswith("logvar_") else ["unet"]
  return layouts.Entry(path, ".".join([*prefix, *parts, name]), layout)


def recognize(tensors: Tensors, metadata: dict) -> dict | None:
  """Infers the `EDM2` attributes of a state dict; None for other networks.

  Attributes that the tensors do not determine (channels per head, balances)
  have their published values.
  """
  del metadata
  if "unet.out_gain" not in tensors:
    return None
  matches = (re.match(r"unet\.enc\.(\d+)x\d+_block(\d+)\.conv_res0\.", n)
             for n in tensors)
  blocks = {(int(m[1]), int(m[2])) for m in matches if m}
  sizes = sorted({size for size, _ in blocks}, reverse=True)
  widths = [_block(tensors, s, "conv_res0").shape[0] for s in sizes]
  emb, noise = tensors["unet.emb_noise.weight"].shape
  # Only the widths themselves are determined, not their common unit.
  unit = math.gcd(*widths, emb, noise)
  label = tensors.get("unet.emb_label.weight")
  return dict(
      image_size=sizes[0],
      model_channels=unit,
      out_channels=tensors["unet.out_conv.weight"].shape[0],
      channel_mult=tuple(w // unit for w in widths),
      channel_mult_noise=None if noise == widths[0] else noise // unit,
      channel_mult_emb=None if emb == max(widths) else emb // unit,
      num_res_blocks=1 + max(index for _, index in blocks),
      attention_resolutions=tuple(
          s for s in sizes if _block(tensors, s, "attn_qkv") is not None
      ),
      num_classes=None if label is None else label.shape[1],
      logvar_channels=tensors["logvar_fourier.freqs"].shape[0],
  )


def _block(tensors: Tensors, size: int, part: str) -> np.ndarray | None:
  return tensors.get(f"unet.enc.{size}x{size}_block0.{part}.weight")
