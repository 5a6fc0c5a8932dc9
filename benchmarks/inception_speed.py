"""Throughput of Inception features, compared with plain matrix products.

  python benchmarks/inception_speed.py docs/results/inception_speed.json

The products have as many multiply-adds as the network, in float32 on the same
devices, and alternate with it: square matrices that fit the cache, and the
shape of one of the network's 1x1 convolutions. On a shared machine wall time
depends on the load; an idle one processes `cores` times
`images_per_core_second` images per second, which is based on CPU time.
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
  """Random parameters that preserve the magnitude of activations."""
  rng = np.random.default_rng(0)
  tensors = {}
  for entry, shape in inception_names.table():
    shape = entry.layout.to_torch(np.broadcast_to(0, shape)).shape
    value = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
      value *= math.sqrt(2 / math.prod(shape[1:]))
    elif entry.path[-1] in ("scale", "var"):
      value = 1 + 0.1 * np.abs(value)
    tensors[entry.name] = value
  return inception_names.to_params(tensors)


def multiply_adds(params: dict[str, Any]) -> int:
  """Multiply-adds per image of the convolutions and the classifier."""
  size = inception.IMAGE_SIZE
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  _, variables = jax.eval_shape(
      lambda params, x: inception.InceptionV3().apply(
          {"params": params}, x, mutable="intermediates",
          capture_intermediates=lambda m, _: isinstance(m, inception.ConvNorm),
      ), params, x,
  )

  def count(params, outputs):
    if "kernel" not in params:
      return sum(count(params[k], v) for k, v in outputs.items() if k in params)
    positions = math.prod(outputs["__call__"][0].shape[1:3])
    return params["kernel"].size * positions

  return params["fc"]["kernel"].size + count(params, variables["intermediates"])


def products(
    rows: int, columns: int, features: int, operations: int
) -> Callable[[], None]:
  """float32 products on all devices, with this total of multiply-adds."""
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
  """Measures a batch and products of equal cost: wall and CPU seconds."""
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
  times = metrics_speed.best(**tasks)
  fastest = {
      clock: min(times[name + clock] for name in ("squares", "convolutions"))
      for clock in ("", " cpu")
  }
  return times | {
      "images_per_second": batch / times["all"],
      "images_per_core_second": batch / times["all cpu"],
      "times_products": times["all"] / fastest[""],
      "times_products cpu": times["all cpu"] / fastest[" cpu"],
  }


def main() -> None:
  """Runs the command."""
  multihost.use_cores(0, math.gcd(*BATCHES))
  params = weights()
  print(f"{'batch':>5} {'images/s':>9} {'/core':>7} {'x products':>11} cpu")
  result = {}
  for batch in BATCHES:
    row = result[batch] = measure(params, batch)
    print(f"{batch:>5} {row['images_per_second']:>9.1f} "
          f"{row['images_per_core_second']:>7.1f} "
          f"{row['times_products']:>11.2f} {row['times_products cpu']:.2f}")
  facts = metrics_speed.facts() | {
      "jax": jax.__version__, "devices": len(jax.devices()),
      "image_size": IMAGE_SIZE, "load": os.getloadavg()[0],
      "multiply_adds_per_image": multiply_adds(params),
  }
  path = str(pathlib.Path(sys.argv[1]).resolve())
  files.write_json(path, {"batches": result} | facts)


if __name__ == "__main__":
  main()
