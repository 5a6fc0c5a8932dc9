"""Networks whose features images are compared by."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.interop.families import inception_names
from bcm_jax.metrics import inception as metric
from bcm_jax.models import inception
from tests import quick
from tests.parity import files


def recipe(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of pytorch-fid's by the files' recipe, seeded by its name."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  z = rng.standard_normal(shape)
  if name.endswith("running_var"):
    z = 1 + 0.1 * np.abs(z)
  elif name.endswith("bn.weight"):
    z = 1 + 0.1 * z
  elif name.endswith(("running_mean", "bias")):
    z = 0.1 * z
  else:
    z = z * np.sqrt(2 / np.prod(shape[1:]))
  return z.astype(np.float32)


@functools.cache
def state_dict(prefix: str = "") -> dict[str, np.ndarray]:
  """All tensors of the network by recipe."""
  found = {}
  for entry, shape in inception_names.table():
    theirs = entry.layout.to_torch(np.broadcast_to(0, shape)).shape
    found[entry.name] = recipe(prefix + entry.name, theirs)
  return found


@functools.cache
def params(prefix: str, precision: str) -> dict:
  """The network's parameters by recipe, on the device."""
  tree = inception_names.to_params(state_dict(prefix))
  return jax.tree.map(lambda v: jnp.asarray(v, precision), tree)


def recipe_image(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """An input in (0, 1) by the files' recipe, channels first, float32."""
  z = np.random.default_rng(seed).standard_normal(shape)
  return (1 / (1 + np.exp(-z))).astype(np.float32)


def image(file: files.Reference) -> np.ndarray:
  """The file's input in [0, 1], channels last, float64."""
  if "in/x" in file:
    return file.image("in/x")
  x = recipe_image(file.meta["input_seed"], file.meta["input_shape"])
  np.testing.assert_array_equal(x.ravel()[:8], file["in/x_first8"])
  return np.moveaxis(x.astype(np.float64), 1, -1)


@functools.cache
def network():
  """(params, x) -> outputs, means of the blocks, and the branch of the sFID.

  One program for all tests: let them have two images.
  """

  def apply(weights, x):
    out, seen = inception.InceptionV3().apply(
        {"params": weights}, x, mutable="intermediates",
        capture_intermediates=lambda m, _: m.path[:-1] == ("Mixed_6d",),
    )
    seen = seen["intermediates"]
    blocks = {
        f"{name}_mean": seen[name][0].mean(axis=(1, 2))
        for name in ("block0", "block1", "block2")
    }
    return out, blocks, seen["Mixed_6d"]["branch1x1"]["__call__"][0]

  return quick.jit(apply)


def run(file, precision):
  """Features of pytorch-fid's Inception, pooled and of its blocks."""
  shapes = file.meta.get("state_dict_shapes")
  if shapes:
    ours = {name: list(v.shape) for name, v in state_dict().items()}
    assert ours == shapes
  weights = params(file.meta.get("recipe_prefix", ""), precision)
  images = jnp.asarray(255 * image(file), precision)
  out, blocks, _ = network()(weights, metric.preprocess(images, "torch"))
  for name, value in {"pool3": out.pooled, **blocks}.items():
    yield file.check(name, value, precision)


RUNNERS = [
    (lambda f: f.source.endswith("pytorch-fid") and f.has("pool3"), run),
]
