"""Throughput of the input pipeline, from prepared images and from JPEG files.

  python benchmarks/input_pipeline.py PHOTOS docs/results/input_pipeline.json

PHOTOS is a folder of photos of any size; some are re-encoded as 64x64 JPEG
files of quality 90, and prepared. Prints and writes as JSON: images per second
of CPU time (summed over threads), the same for the minimal work (the bound),
and images per second of wall time with grain and with tf.data as prefetcher.
The prefetchers run in separate processes, alternating, median of several
rounds. See benchmarks/step_time.py for the time that a training step waits.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import PIL.Image

from bcm_jax.data import datasets
from bcm_jax.data import pipeline
from bcm_jax.data import prepare
from bcm_jax.utils import files
from bcm_jax.utils import provenance

SIZE, BATCH, IMAGES, STEPS, ROUNDS = 64, 256, 4096, 60, 5


def write_photos(source: str, out: pathlib.Path) -> None:
  """Writes IMAGES photos of a folder as 64x64 JPEG files in two classes."""
  paths = sorted(pathlib.Path(source).rglob("*.jp*g"))[:IMAGES]
  for i, path in enumerate(paths):
    folder = out / f"class{i % 2}"
    folder.mkdir(parents=True, exist_ok=True)
    with PIL.Image.open(path) as image:
      small = image.convert("RGB").resize((SIZE, SIZE), PIL.Image.LANCZOS)
    small.save(folder / f"{i:05d}.jpg", quality=90)


def batches_of(name: str, path: str, threads: int | None = None):
  """Returns the batches of a dataset as in training."""
  source = datasets.find(name, path=path, threads=threads).open("train", None)
  return pipeline.Batches(source, 0, BATCH, flip=True)


def cost(make, steps: int) -> float:
  """Images per second of CPU time, summed over threads."""
  make(0)
  start = time.process_time()
  for step in range(1, steps + 1):
    make(step)
  return steps * BATCH / (time.process_time() - start)


def bare_decoding(path: str):
  """Minimal work for JPEG files: decoding with Pillow."""
  names = sorted(pathlib.Path(path).rglob("*.jpg"))

  def make(step):
    ids = pipeline.batch_indices(0, step, BATCH, len(names))
    out = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
    for i, k in enumerate(ids):
      with PIL.Image.open(names[k]) as image:
        out[i] = np.asarray(image)
    return out

  return make


def bare_copying(path: str):
  """Minimal work for prepared images: a copy of pixels in memory."""
  del path
  pixels = np.zeros((IMAGES, SIZE, SIZE, 3), np.uint8)

  def make(step):
    return pixels[pipeline.batch_indices(0, step, BATCH, IMAGES)]

  return make


# Prefetchers, each in a separate process --------------------------------------


def _grain(name: str, path: str):
  yield from pipeline.prefetch(batches_of(name, path), 0, 10**6)


def _tf_data(name: str, path: str):
  """tf.data over our batches; TensorFlow decodes the JPEG files."""
  import tensorflow as tf

  if name == "folder":
    paths = [str(p) for p in sorted(pathlib.Path(path).rglob("*.jpg"))]
    names = tf.constant(paths)
    n = len(paths)

    def read(i):
      image = tf.io.decode_jpeg(tf.io.read_file(names[i]), channels=3)
      image.set_shape((SIZE, SIZE, 3))
      return image

    def ids():
      for step in range(10**6):
        yield from pipeline.batch_indices(0, step, BATCH, n)

    data = tf.data.Dataset.from_generator(
        ids, output_signature=tf.TensorSpec((), tf.int64)
    ).map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(BATCH).prefetch(2)
  else:
    make = batches_of(name, path)
    data = tf.data.Dataset.range(10**6).map(
        lambda k: tf.numpy_function(
            lambda k: make(int(k))["image"], [k], tf.uint8
        ),
        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True,
    ).prefetch(2)
  yield from data.as_numpy_iterator()


PREFETCHERS = {"grain": _grain, "tf.data": _tf_data}


def measure_prefetcher(prefetcher: str, name: str, path: str) -> None:
  """Prints images per second of wall time, after a warm-up."""
  stream = PREFETCHERS[prefetcher](name, path)
  for _ in range(5):
    next(stream)
  start = time.perf_counter()
  for _ in range(STEPS):
    next(stream)
  print(json.dumps(STEPS * BATCH / (time.perf_counter() - start)))
  os._exit(0)  # TensorFlow's threads may keep the process alive.


def compare_prefetchers(name: str, path: str) -> dict[str, float]:
  """Measures images per second of every prefetcher, alternating."""
  rates = {prefetcher: [] for prefetcher in PREFETCHERS}
  for _ in range(ROUNDS):
    for prefetcher, samples in rates.items():
      process = subprocess.run(
          [sys.executable, __file__, "--prefetcher", prefetcher, name, path],
          capture_output=True, text=True, check=True, timeout=300,
      )
      samples.append(float(process.stdout.splitlines()[-1]))
  return {name: statistics.median(samples) for name, samples in rates.items()}


def main() -> None:
  """Runs the command."""
  photos, out = sys.argv[1:3]
  result: dict[str, Any] = {"size": SIZE, "batch": BATCH, "images": IMAGES}
  with tempfile.TemporaryDirectory() as folder:
    jpegs, prepared = f"{folder}/jpegs", f"{folder}/prepared"
    write_photos(photos, pathlib.Path(jpegs, "train"))
    prepare.main([jpegs, prepared, f"--size={SIZE}"])
    # Alternates the pipeline and the minimal work.
    kinds = {
        "prepared": (batches_of("prepared", prepared), bare_copying(jpegs)),
        "folder": (batches_of("folder", jpegs, 1), bare_decoding(jpegs)),
    }
    for name, makes in kinds.items():
      rates = [[], []]
      for _ in range(ROUNDS):
        for make, samples in zip(makes, rates, strict=True):
          samples.append(cost(make, 10))
      pipeline_rate, bound = (statistics.median(samples) for samples in rates)
      result[name] = {
          "images_per_core_second": pipeline_rate,
          "bound": bound,
          "fraction_of_bound": pipeline_rate / bound,
          "images_per_second": compare_prefetchers(
              name, prepared if name == "prepared" else jpegs
          ),
      }
      print(name, json.dumps(result[name], indent=2))
  files.write_json(os.path.abspath(out), result | provenance.machine())


if __name__ == "__main__":
  if sys.argv[1:2] == ["--prefetcher"]:
    measure_prefetcher(*sys.argv[2:])
  main()
