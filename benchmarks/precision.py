"""Error of half precision forward passes, relative to float32.

  python benchmarks/precision.py docs/results/precision.json

All levels in half precision (model.float32_levels=0). Networks of the published
shapes at a quarter of their width, random weights of
trained magnitude (normal, 1 / sqrt(fan-in)), noise levels over the whole range.
Prints and writes as JSON the root mean square of F(half) - F(float32), relative
to that of F(float32).
"""

import json
import math
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import __version__
from bcm_jax.models import adm
from bcm_jax.models import edm2
from bcm_jax.models import song

NETWORKS = {
    "bcm": (adm.ADM(model_channels=64, num_classes=10, two_time=True), 32),
    "openai cm": (adm.ADM(
        model_channels=64, use_scale_shift_norm=True, qkv_norm=False,
        attention_resolutions=(16, 8)), 32),
    "ddpm++": (song.SongUNet(model_channels=32), 32),
    "ncsn++": (song.SongUNet(model_channels=32, **song.NCSNPP), 32),
    "edm2": (edm2.EDM2(model_channels=64, num_classes=10), 32),
}
SIGMAS = (0.002, 0.02, 0.2, 2.0, 20.0, 80.0)


def arguments(network, size):
  """Inputs of unit variance at all noise levels."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((len(SIGMAS), size, size, 3)).astype(np.float32)
  scale = 250 if isinstance(network, adm.ADM) else 0.25
  t = scale * jnp.log(jnp.asarray(SIGMAS))
  labels = None if network.num_classes is None else jnp.zeros(len(t), jnp.int32)
  return x, t, t[::-1] if network.two_time else None, labels


def weights(network, args):
  """Random parameters without zeros."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *args)["params"]

  def init(path, leaf):
    fan_in = max(1, math.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1
    value = rng.standard_normal(leaf.shape) / math.sqrt(fan_in)
    if path[-1].key in ("scale", "out_gain", "emb_gain"):
      value = 1 + 0.1 * value
    elif path[-1].key == "bias":
      value = 0.1 * value
    return np.asarray(value, np.float32)

  return jax.tree_util.tree_map_with_path(init, shapes)


def main() -> None:
  """Runs the command."""
  result = {}
  for name, (network, size) in NETWORKS.items():
    args = arguments(network, size)
    params = {"params": weights(network, args)}
    exact = np.asarray(jax.jit(network.apply)(params, *args), np.float64)
    axes = (1, 2, 3)
    norm = np.sqrt(np.mean(exact**2, axis=axes))
    result[name] = {}
    for dtype in ("bfloat16", "float16"):
      half = network.clone(dtype=dtype, float32_levels=0)
      out = jax.jit(half.apply)(params, *args)
      error = np.sqrt(np.mean((np.asarray(out) - exact) ** 2, axis=axes)) / norm
      result[name][dtype] = {
          "worst": float(error.max()), "mean": float(error.mean())
      }
      print(f"{name:<10} {dtype:<9} mean {error.mean():.2e} "
            f"worst {error.max():.2e}")
  with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump({
        "relative_rms_of_F": result, "sigmas": SIGMAS, "bcm_jax": __version__,
        "jax": jax.__version__, "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
    }, file, indent=2)
    file.write("\n")


if __name__ == "__main__":
  main()
