"""Tensor names of ADM state dicts: CM, iCT, BCM and CTM on ImageNet-64."""

import re

import numpy as np

from bcm_jax.interop import layouts
from bcm_jax.models import adm

Tensors = dict[str, np.ndarray]

NAME = "openai"
NETWORK = adm.ADM
PREFIXES = ("",)
IMAGE_SIZE = 64


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
  do not determine have their published values: 64 channels per head, and QKV
  normalization for iCT and BCM.
  """
  del metadata
  if not {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(tensors):
    return None
  width = tensors["time_embed.0.weight"].shape[1]
  levels, attention, updown = _levels(tensors)
  scale_shift = _rows(tensors, "input_blocks.1.0.emb_layers.1") == 2 * _rows(
      tensors, "input_blocks.1.0.in_layers.2"
  )
  has_align = "time_embed_align.weight" in tensors
  return dict(
      model_channels=width,
      out_channels=tensors["out.2.weight"].shape[0],
      channel_mult=tuple(
          _rows(tensors, f"input_blocks.{level[0]}.0.in_layers.2") // width
          for level in levels
      ),
      num_res_blocks=len(levels[0]),
      attention_levels=attention,
      num_classes=(
          tensors["label_emb.weight"].shape[0]
          if "label_emb.weight" in tensors else None
      ),
      two_time=has_align or "time_embed_s.0.weight" in tensors,
      end_branch=(
          "blocks" if "time_embed_s.0.weight" in tensors else "align"
      ),
      resblock_updown=updown,
      use_scale_shift_norm=scale_shift,
      qkv_norm=has_align or not scale_shift,
      num_head_channels=64,
  )


def _rows(tensors: Tensors, name: str) -> int:
  return tensors[f"{name}.weight"].shape[0]


def _levels(tensors):
  """Returns (input blocks of each level, attention levels, resblock_updown).

  In the encoder, the tensors of a downsampling residual block do not differ
  from those of other blocks. The levels are therefore counted in the decoder,
  where an upsampling layer follows another block.
  """
  blocks = 1 + max(
      int(n.split(".")[1]) for n in tensors if n.startswith("input_blocks.")
  )
  upsampling = {
      (n.split(".")[1], "in_layers" in n)
      for n in tensors
      if re.match(r"output_blocks\.\d+\.[12]\.(in_layers\.0\.weight"
                  r"|conv\.weight)", n)
  }
  count = 1 + len(upsampling)
  per_level = blocks // count
  levels = [
      list(range(1 + i * per_level, (i + 1) * per_level))
      for i in range(count)
  ]
  attention = tuple(
      i for i, level in enumerate(levels)
      if f"input_blocks.{level[0]}.1.qkv.weight" in tensors
  )
  return levels, attention, all(updown for _, updown in upsampling)
