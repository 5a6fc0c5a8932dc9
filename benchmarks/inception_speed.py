"""Inception features: images a second, beside bare matrix products.

  python benchmarks/inception_speed.py docs/results/inception_speed.json

The products have as many multiply-adds as the network, in float32 on the same
devices, in turns with it: of squares that fit the cache, and of the shape of
one of the network's own 1x1 convolutions. On a machine that others use, wall
time says how busy it was; a free one does `cores` times as many images a second
as there are `images_per_core_second`, those of processor time.
"""

from collections.abc import Callable
import math
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import metrics_speed
import numpy as np

from bcm_jax.interop.families import inception_names
from bcm_jax.metrics import inception as metric
from bcm_jax.models import inception
from bcm_jax.training import multihost
from bcm_jax.training import sharding
from bcm_jax.utils import files

BATCHES = (16, 32, 64)
IMAGE_SIZE = 32
SQUARE = 1024
# Positions and channels of a 1x1 convolution at 17x17.
NETWORK = (289, 768, 192)


def weights() -> dict[str, Any]:
  """Random parameters that keep activations at about their size."""
  rng = np.random.default_rng(0)
  tensors = {}
  for entry, shape in inception_names.table():
    shape = entry.layout.theirs(np.broadcast_to(0, shape)).shape
    value = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
      value *= math.sqrt(2 / math.prod(shape[1:]))
    elif entry.path[-1] in ("scale", "var"):
      value = 1 + 0.1 * np.abs(value)
    tensors[entry.name] = value
  return inception_names.to_params(tensors)


def multiply_adds(params: dict[str, Any]) -> int:
  """Of the convolutions and the classifier, for one image."""
  size = inception.IMAGE_SIZE
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  _, seen = jax.eval_shape(
      lambda params, x: inception.InceptionV3().apply(
          {"params": params}, x, mutable="intermediates",
          capture_intermediates=lambda m, _: isinstance(m, inception.ConvNorm),
      ), params, x,
  )

  def count(params, seen):
    if "kernel" not in params:
      return sum(count(params[k], v) for k, v in seen.items() if k in params)
    positions = math.prod(seen["__call__"][0].shape[1:3])
    return params["kernel"].size * positions

  return params["fc"]["kernel"].size + count(params, seen["intermediates"])


def products(
    rows: int, columns: int, features: int, operations: int
) -> Callable[[], None]:
  """float32 products on all devices, of this many multiply-adds together."""
  mesh = sharding.make_mesh()
  split = jax.NamedSharding(mesh, jax.P((sharding.DATA, sharding.FSDP)))
  rng = np.random.default_rng(0)
  a, b = (
      jax.device_put(rng.standard_normal((mesh.size, *s), np.float32), split)
      for s in ((rows, columns), (columns, features))
  )
  multiply = jax.jit(jnp.matmul, out_shardings=split)
  repeats = round(operations / (mesh.size * rows * columns * features))

  def run():
    for _ in range(repeats):
      jax.block_until_ready(multiply(a, b))

  return run


def measure(params: dict[str, Any], batch: int) -> dict[str, float]:
  """Seconds of one batch and of products, wall and processor's."""
  features = metric.inception_features(params, batch_size=batch)
  shape = (batch, IMAGE_SIZE, IMAGE_SIZE, 3)
  images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
  operations = batch * multiply_adds(params)
  positions, columns, outputs = NETWORK
  rows = positions * batch // len(jax.devices())
  tasks = dict(
      all=lambda: features(images),
      squares=products(SQUARE, SQUARE, SQUARE, operations),
      convolutions=products(rows, columns, outputs, operations),
  )
  for task in tasks.values():
    task()  # Compiles.
  found = metrics_speed.best(**tasks)
  fastest = {
      of: min(found[name + of] for name in ("squares", "convolutions"))
      for of in ("", " cpu")
  }
  return found | {
      "images_per_second": batch / found["all"],
      "images_per_core_second": batch / found["all cpu"],
      "times_products": found["all"] / fastest[""],
      "times_products cpu": found["all cpu"] / fastest[" cpu"],
  }


def main() -> None:
  """Measures, prints and writes."""
  multihost.use_cores(0, math.gcd(*BATCHES))
  params = weights()
  print(f"{'batch':>5} {'images/s':>9} {'a core':>7} {'x products':>11} cpu")
  result = {}
  for batch in BATCHES:
    found = result[batch] = measure(params, batch)
    print(f"{batch:>5} {found['images_per_second']:>9.1f} "
          f"{found['images_per_core_second']:>7.1f} "
          f"{found['times_products']:>11.2f} {found['times_products cpu']:.2f}")
  facts = metrics_speed.facts() | {
      "jax": jax.__version__, "devices": len(jax.devices()),
      "image_size": IMAGE_SIZE, "load": os.getloadavg()[0],
      "multiply_adds_an_image": multiply_adds(params),
  }
  path = str(pathlib.Path(sys.argv[1]).resolve())
  files.write_json(path, {"batches": result} | facts)


if __name__ == "__main__":
  main()
