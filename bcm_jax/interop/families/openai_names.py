"""Tensor names of ADM state dicts: CM, iCT, BCM and CTM on ImageNet-64."""

import re

import numpy as np

from bcm_jax.interop import layouts
from bcm_jax.models import adm

Tensors = dict[str, np.ndarray]

NAME = "openai"
NETWORK = adm.ADM
PREFIXES = ("",)
# Image size of OpenAI's and BCM's networks (create_model) by channel_mult. The
# tensors do not determine it.
_IMAGE_SIZES = {
    (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256,
}
# A tensor that every network of the family has.
MARKER = "time_embed.0.weight"
# Attributes that the tensors do not determine.
ASSUMED = ("num_head_channels", "qkv_norm")


def entry(network, path, shape) -> layouts.Entry:
  """Maps a parameter to its published tensor.

  input_blocks_4_0/in_layers_2/kernel -> input_blocks.4.0.in_layers.2.weight.
  """
  del network
  *modules, leaf = path
  name, layout = layouts.torch_leaf(leaf, len(shape))
  if modules[-1] in ("qkv", "proj_out") and leaf == "kernel":
    layout = layouts.POINTWISE
  parts = [re.sub(r"_(\d+)", r".\1", m) for m in modules]
  return layouts.Entry(path, ".".join([*parts, name]), layout)


def recognize(tensors: Tensors, metadata: dict) -> dict | None:
  """Infers the `ADM` attributes of a state dict; None for other networks.

  Returns attention levels instead of resolutions. Attributes that the tensors
  do not determine have their published values: 64 channels per head, QKV
  normalization for iCT and BCM on 64 pixels, and the image size of
  channel_mult; no image size for another channel_mult.
  """
  if not {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(tensors):
    return None
  width = tensors["time_embed.0.weight"].shape[1]
  levels, attention, updown, convolves = _levels(tensors)
  scale_shift = _rows(tensors, "input_blocks.1.0.emb_layers.1") == 2 * _rows(
      tensors, "input_blocks.1.0.in_layers.2"
  )
  has_align = "time_embed_align.weight" in tensors
  channel_mult = tuple(
      _rows(tensors, f"input_blocks.{level[0]}.0.in_layers.2") // width
      for level in levels
  )
  size = metadata.get("image_size", _IMAGE_SIZES.get(channel_mult))
  return dict(
      image_size=size,
      model_channels=width,
      out_channels=tensors["out.2.weight"].shape[0],
      channel_mult=channel_mult,
      num_res_blocks=len(levels[0]),
      attention_levels=attention,
      num_classes=(
          tensors["label_emb.weight"].shape[0]
          if "label_emb.weight" in tensors else None
      ),
      channel_mult_emb=_rows(tensors, "time_embed.0") // width,
      two_time=has_align or "time_embed_s.0.weight" in tensors,
      end_branch=(
          "blocks" if "time_embed_s.0.weight" in tensors else "align"
      ),
      resblock_updown=updown,
      conv_resample=convolves,
      use_scale_shift_norm=scale_shift,
      qkv_norm=has_align or not scale_shift and size != 256,
      num_head_channels=64,
  )


def _rows(tensors: Tensors, name: str) -> int:
  return tensors[f"{name}.weight"].shape[0]


def _levels(tensors):
  """Returns (input blocks of each level, attention levels, resblock_updown,
  conv_resample).

  In the encoder, the tensors of a downsampling residual block do not differ
  from those of other blocks. The levels are therefore counted in the decoder,
  where an upsampling layer follows another block.
  """
  indices = {
      int(n.split(".")[1]) for n in tensors if n.startswith("input_blocks.")
  }
  blocks = 1 + max(indices)
  upsampling = {
      (n.split(".")[1], "in_layers" in n)
      for n in tensors
      if re.match(r"output_blocks\.\d+\.[12]\.(in_layers\.0\.weight"
                  r"|conv\.weight)", n)
  }
  # Resampling without convolution has no tensors.
  without = blocks - len(indices)
  count = 1 + (without or len(upsampling))
  per_level = blocks // count
  levels = [
      list(range(1 + i * per_level, (i + 1) * per_level))
      for i in range(count)
  ]
  attention = tuple(
      i for i, level in enumerate(levels)
      if f"input_blocks.{level[0]}.1.qkv.weight" in tensors
  )
  updown = not without and all(updown for _, updown in upsampling)
  return levels, attention, updown, not without
