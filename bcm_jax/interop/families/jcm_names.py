"""Tensor names of OpenAI's CIFAR-10 consistency models (jcm) for `SongUNet`.

jcm's NCSN++ is a Flax module with automatic names: Flax numbers the modules of
each class in the order of their calls.
"""

import functools

import numpy as np

from bcm_jax.interop import layouts
from bcm_jax.models import song

Tensors = dict[str, np.ndarray]

NAME = "jcm"
NETWORK = song.SongUNet
PREFIXES = ("",)
IMAGE_SIZE = 32
# A tensor that every network of the family has.
MARKER = "ResnetBlockBigGANpp_0/Conv_0/kernel"
# Attributes that the tensors do not determine.
ASSUMED = ("attention_resolutions", "resample_filter")

_RES = "ResnetBlockBigGANpp"
_PARTS = {
    "norm0": "GroupNorm_0", "conv0": "Conv_0", "affine": "Dense_0",
    "norm1": "GroupNorm_1", "conv1": "Conv_1", "skip": "Conv_2",
}


@functools.cache
def _modules(levels, num_res_blocks, attention, size) -> dict[str, str]:
  """Returns {`SongUNet` module: jcm module}; '/attention' marks attention."""
  top = f"{size}x{size}"
  names = {
      "map_noise": "GaussianFourierProjection_0", "map_layer0": "Dense_0",
      "map_layer1": "Dense_1", f"enc_{top}_conv": "Conv_0",
      f"dec_{top}_aux_norm": "GroupNorm_0", f"dec_{top}_aux_conv": "Conv_1",
  }
  blocks = attends = 0

  def block(name, attend=False):
    nonlocal blocks, attends
    names[name] = f"{_RES}_{blocks}"
    blocks += 1
    if attend:
      names[f"{name}/attention"] = f"AttnBlockpp_{attends}"
      attends += 1

  sizes = [size >> level for level in range(levels)]
  for level, s in enumerate(sizes):
    if level:
      block(f"enc_{s}x{s}_down")
      names[f"enc_{s}x{s}_aux_residual"] = f"Downsample_{level - 1}/Conv2d_0"
    for i in range(num_res_blocks):
      block(f"enc_{s}x{s}_block{i}", s in attention)
  low = sizes[-1]
  block(f"dec_{low}x{low}_in0", True)
  block(f"dec_{low}x{low}_in1")
  for s in reversed(sizes):
    if s != low:
      block(f"dec_{s}x{s}_up")
    for i in range(num_res_blocks + 1):
      block(f"dec_{s}x{s}_block{i}", i == num_res_blocks and s in attention)
  return names


def entry(network, path, shape, image_size=IMAGE_SIZE) -> layouts.Entry:
  """Maps a parameter to its published tensor.

  enc_32x32_block0/conv0/kernel -> ResnetBlockBigGANpp_0/Conv_0/kernel.
  """
  del shape
  *modules, leaf = path
  names = _modules(
      len(network.channel_mult), network.num_res_blocks,
      tuple(network.attention_resolutions), image_size,
  )
  if modules[0] == "map_noise":
    leaf = "W"
  elif modules[0].endswith("_aux_residual"):
    leaf = {"kernel": "weight"}.get(leaf, leaf)
  parts = [names.get(modules[0], modules[0])]
  if len(modules) > 1 and modules[1] in _PARTS:
    parts.append(_PARTS[modules[1]])
  elif len(modules) > 1:
    parts = [names[f"{modules[0]}/attention"]]
    if modules[1] == "norm2":
      parts.append("GroupNorm_0")
    else:
      leaf = {"kernel": "W", "bias": "b"}[leaf]
      parts.append("NIN_3" if modules[1] == "proj" else "NIN_012")
  return layouts.Entry(path, "/".join([*parts, leaf]), layouts.SAME)


def join(tensors: Tensors) -> Tensors:
  """Concatenates query, key and value (NIN_0, NIN_1, NIN_2) as NIN_012."""
  joined = {}
  for name, value in tensors.items():
    if "/NIN_0/" in name:
      parts = [tensors[name.replace("NIN_0", f"NIN_{i}")] for i in range(3)]
      value = np.concatenate(parts, axis=-1)
    elif "/NIN_1/" in name or "/NIN_2/" in name:
      continue
    joined[name.replace("/NIN_0/", "/NIN_012/")] = value
  return joined


def split(tensors: Tensors) -> Tensors:
  """Splits NIN_012 into NIN_0, NIN_1 and NIN_2, the inverse of `join`."""
  parts = {}
  for name, value in tensors.items():
    if "/NIN_012/" not in name:
      parts[name] = value
      continue
    for i, third in enumerate(np.split(value, 3, axis=-1)):
      parts[name.replace("NIN_012", f"NIN_{i}")] = third
  return parts


def recognize(tensors: Tensors, metadata: dict) -> dict | None:
  """Infers the `SongUNet` attributes; None for other networks.

  The tensors do not determine the image size, the attention resolutions and the
  resampling filter. The first two are 32 pixels and half the image size unless
  `metadata` sets them; NCSN++ has the published filter, DDPM++ has none.
  """
  blocks = [
      n.removesuffix("/Conv_0/kernel")
      for n in tensors
      if n.startswith(_RES) and n.endswith("/Conv_0/kernel")
  ]
  if not blocks:
    return None
  size = metadata.get("image_size", IMAGE_SIZE)
  width = tensors["Conv_0/kernel"].shape[-1]
  # A block with equal input and output width has a skip convolution only if it
  # resamples.
  resampling = sum(
      len(set(tensors[f"{b}/Conv_2/kernel"].shape[-2:])) == 1
      for b in blocks if f"{b}/Conv_2/kernel" in tensors
  )
  levels = 1 + resampling // 2
  # n + (n + 1) per level, two between neighboring levels, two in the middle.
  per_level = (len(blocks) - 2 - 2 * (levels - 1) - levels) // (2 * levels)
  widths = [
      tensors[f"{_RES}_{level * (per_level + 1)}/Conv_0/kernel"].shape[-1]
      for level in range(levels)
  ]
  fourier = "GaussianFourierProjection_0/W" in tensors
  pyramid = "Downsample_0/Conv2d_0/weight" in tensors
  return dict(
      image_size=size,
      model_channels=width,
      out_channels=tensors["Conv_1/kernel"].shape[-1],
      channel_mult=tuple(w // width for w in widths),
      num_res_blocks=per_level,
      attention_resolutions=metadata.get("attention_resolutions", (size // 2,)),
      embedding="fourier" if fourier else "positional",
      embedding_mult=tensors["Dense_0/kernel"].shape[0] // width,
      encoder="residual" if pyramid else "standard",
      resample_filter=song.NCSNPP["resample_filter"] if pyramid else (1, 1),
  )
