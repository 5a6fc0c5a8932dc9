"""Tensor names of SongUNet state dicts: EDM, and CTM and ECT on CIFAR-10."""

import re

import numpy as np

from bcm_jax.interop import layouts
from bcm_jax.models import song

Tensors = dict[str, np.ndarray]

NAME = "edm-song"
NETWORK = song.SongUNet
PREFIXES = ("model.", "")
# A tensor that every network of the family has.
MARKER = "map_layer0.weight"
# Attributes that the tensors do not determine.
ASSUMED = ()


def entry(network, path, shape) -> layouts.Entry:
  """Maps a parameter to its published tensor.

  enc_16x16_block0/conv0/kernel -> enc.16x16_block0.conv0.weight.
  """
  del network
  *modules, leaf = path
  name, layout = layouts.torch_leaf(leaf, len(shape))
  if modules[-1] in ("qkv", "proj"):
    channels = shape[-1] // (3 if modules[-1] == "qkv" else 1)
    layout = layouts.POINTWISE if leaf == "kernel" else layouts.SAME
    if modules[-1] == "qkv":
      layout = layouts.chain(layout, layouts.interleaved_qkv(channels, 1))
  top = re.sub(r"^(enc|dec)_", r"\1.", modules[0])
  return layouts.Entry(path, ".".join([top, *modules[1:], name]), layout)


def resample_filter(taps) -> np.ndarray:
  """Returns the filter buffer [1, 1, k, k] of a resampling convolution."""
  taps = np.asarray(taps, np.float32)
  return (np.outer(taps, taps) / taps.sum() ** 2)[None, None]


def constants(network, names) -> Tensors:
  """Returns the buffers that are determined by the network attributes."""
  resampling = set()
  for name in names:
    block, _, part = name.rpartition(".weight")[0].rpartition(".")
    if re.search(r"x\d+_(down|up)$", block) and part in ("conv0", "skip"):
      resampling.add(f"{block}.{part}")
    elif part.endswith("_aux_residual"):
      resampling.add(f"{block}.{part}")
    elif part.endswith("_aux_skip"):
      resampling.add(f"{block}.{part.replace('_aux_skip', '_aux_down')}")
    elif part.endswith("_aux_conv") and network.decoder == "skip":
      resampling.add(f"{block}.{part.replace('_aux_conv', '_aux_up')}")
  if network.decoder == "skip":  # The lowest level does not upsample.
    sizes = [int(re.search(r"(\d+)x\d+_aux_up", n)[1])
             for n in resampling if n.endswith("_aux_up")]
    resampling.discard(f"dec.{min(sizes)}x{min(sizes)}_aux_up")
  value = resample_filter(network.resample_filter)
  return {f"{n}.resample_filter": value for n in resampling}


def recognize(tensors: Tensors, metadata: dict) -> dict | None:
  """Infers the `SongUNet` attributes; None for other networks."""
  del metadata
  sizes = resolutions(tensors)
  if not sizes or not any(n.endswith("_aux_norm.weight") for n in tensors):
    return None
  top = f"{sizes[0]}x{sizes[0]}"
  width = tensors[f"enc.{top}_conv.weight"].shape[0]
  pyramid = {
      kind for kind in ("skip", "residual")
      if any(n.endswith(f"_aux_{kind}.weight") for n in tensors)
  }
  filters = [v for n, v in tensors.items() if n.endswith("resample_filter")]
  heads = sum(n.endswith("_aux_norm.weight") for n in tensors)
  return dict(
      image_size=sizes[0],
      model_channels=width,
      out_channels=tensors[f"dec.{top}_aux_conv.weight"].shape[0],
      channel_mult=tuple(
          tensors[f"enc.{s}x{s}_block0.conv0.weight"].shape[0] // width
          for s in sizes
      ),
      num_res_blocks=count_blocks(tensors, sizes[0]),
      attention_resolutions=tuple(
          s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors
      ),
      num_classes=shape(tensors, "map_label.weight", 1),
      two_time=bool({"map_layer0_s.weight", "map_align.weight"} & set(tensors)),
      end_branch="blocks" if "map_layer0_s.weight" in tensors else "align",
      augment_dim=shape(tensors, "map_augment.weight", 1) or 0,
      embedding="fourier" if "map_noise.freqs" in tensors else "positional",
      embedding_mult=tensors["map_layer0.weight"].shape[1] // width,
      channel_mult_emb=tensors["map_layer0.weight"].shape[0] // width,
      encoder=pyramid.pop() if pyramid else "standard",
      decoder="skip" if heads > 1 else "standard",
      resample_filter=taps(filters[0]) if filters else (1, 1),
  )


def resolutions(tensors: Tensors) -> list[int]:
  """Returns the resolutions of the encoder levels in pixels, highest first."""
  matches = (re.match(r"enc\.(\d+)x\d+_block0\.conv0\.weight", n)
             for n in tensors)
  return sorted({int(m[1]) for m in matches if m}, reverse=True)


def count_blocks(tensors: Tensors, size: int) -> int:
  """Returns the number of residual blocks of an encoder level."""
  return sum(
      bool(re.match(rf"enc\.{size}x{size}_block\d+\.conv0\.weight$", n))
      for n in tensors
  )


def shape(tensors: Tensors, name: str, axis: int) -> int | None:
  """Returns the size of an axis of a tensor; None if it does not exist."""
  return tensors[name].shape[axis] if name in tensors else None


def taps(buffer: np.ndarray) -> tuple[int, ...]:
  """Returns the integer filter taps of a buffer, such as (1, 3, 3, 1)."""
  row = np.asarray(buffer, np.float64).reshape(buffer.shape[-2:]).sum(0)
  return tuple(int(round(v)) for v in row / row.min())
