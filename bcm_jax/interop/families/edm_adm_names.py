"""Tensor names of EDM's DhariwalUNet state dicts (ImageNet) for `ADM`."""

import functools

import numpy as np

from bcm_jax.interop import layouts
from bcm_jax.interop.families import edm_names
from bcm_jax.models import adm

Tensors = dict[str, np.ndarray]

NAME = "edm-adm"
NETWORK = adm.ADM
PREFIXES = ("model.", "")
IMAGE_SIZE = 64
# A tensor that every network of the family has.
MARKER = "map_layer0.weight"
# Attributes that the tensors do not determine.
ASSUMED = ("num_head_channels",)

_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}
_PARTS = _ATTENTION | {
    "in_layers_0": "norm0", "in_layers_2": "conv0", "emb_layers_1": "affine",
    "out_layers_0": "norm1", "out_layers_3": "conv1",
    "skip_connection": "skip",
}


@functools.cache
def _blocks(levels: int, num_res_blocks: int, size: int) -> dict[str, str]:
  """Returns {`ADM` block: EDM block}; '/up' marks an upsampling block."""
  names = {
      "time_embed_0": "map_layer0", "time_embed_2": "map_layer1",
      "label_emb": "map_label", "map_augment": "map_augment",
      "out_0": "out_norm", "out_2": "out_conv",
      "input_blocks_0": f"enc.{size}x{size}_conv",
  }
  index = 1
  for level in range(levels):
    resolution = f"{size >> level}x{size >> level}"
    if level:
      names[f"input_blocks_{index}"] = f"enc.{resolution}_down"
      index += 1
    for block in range(num_res_blocks):
      names[f"input_blocks_{index}"] = f"enc.{resolution}_block{block}"
      index += 1
  lowest = f"{size >> (levels - 1)}x{size >> (levels - 1)}"
  names |= {
      "middle_block_0": f"dec.{lowest}_in0",
      "middle_block_1": f"dec.{lowest}_in0",
      "middle_block_2": f"dec.{lowest}_in1",
  }
  index = 0
  for level in reversed(range(levels)):
    resolution = f"{size >> level}x{size >> level}"
    for block in range(num_res_blocks + 1):
      names[f"output_blocks_{index}"] = f"dec.{resolution}_block{block}"
      index += 1
    if level:
      finer = size >> (level - 1)
      names[f"output_blocks_{index - 1}/up"] = f"dec.{finer}x{finer}_up"
  return names


def entry(network, path, shape, image_size=IMAGE_SIZE) -> layouts.Entry:
  """Maps a parameter to its published tensor.

  input_blocks_1_0/in_layers_2/kernel -> enc.64x64_block0.conv0.weight.
  """
  *modules, leaf = path
  names = _blocks(
      len(network.channel_mult), network.num_res_blocks, image_size
  )
  name, layout = layouts.torch_leaf(leaf, len(shape))
  if modules[0] == "label_emb":  # EDM: a linear layer of one-hot labels.
    layout = layouts.DENSE
  block, _, part = modules[0].rpartition("_")
  if modules[0] in names:
    parts = [names[modules[0]]]
  elif block.startswith("output") and part != "0" and (
      modules[1] not in _ATTENTION
  ):
    parts = [names[f"{block}/up"]]
  else:
    parts = [names[block]]
  if len(modules) > 1:
    parts.append(_PARTS[modules[1]])
    if modules[1] in ("qkv", "proj_out"):
      layout = layouts.POINTWISE if leaf == "kernel" else layouts.SAME
    if modules[1] == "qkv":
      channels = shape[-1] // 3
      heads = channels // network.num_head_channels
      layout = layouts.chain(layout, layouts.interleaved_qkv(channels, heads))
  return layouts.Entry(path, ".".join([*parts, name]), layout)


def constants(network, names) -> Tensors:
  """Returns the buffers that are determined by the network attributes."""
  del network
  blocks = {n.rsplit(".", 2)[0] for n in names}
  value = edm_names.resample_filter((1, 1))
  return {
      f"{block}.{part}.resample_filter": value
      for block in blocks if block.endswith(("_down", "_up"))
      for part in ("conv0", "skip")
  }


def recognize(tensors: Tensors, metadata: dict) -> dict | None:
  """Infers the `ADM` attributes of a state dict; None for other networks."""
  del metadata
  sizes = edm_names.resolutions(tensors)
  if not sizes or "out_norm.weight" not in tensors:
    return None
  emb, width = tensors["map_layer0.weight"].shape
  return adm.DHARIWAL | dict(
      image_size=sizes[0],
      model_channels=width,
      out_channels=tensors["out_conv.weight"].shape[0],
      channel_mult=tuple(
          tensors[f"enc.{s}x{s}_block0.conv0.weight"].shape[0] // width
          for s in sizes
      ),
      channel_mult_emb=emb // width,
      num_res_blocks=edm_names.count_blocks(tensors, sizes[0]),
      attention_resolutions=tuple(
          s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors
      ),
      num_head_channels=64,
      num_classes=edm_names.shape(tensors, "map_label.weight", 1),
      augment_dim=edm_names.shape(tensors, "map_augment.weight", 1) or 0,
  )
