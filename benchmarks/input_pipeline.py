"""How fast batches come, from prepared images and from JPEG files.

  python benchmarks/input_pipeline.py PHOTOS docs/results/input_pipeline.json

PHOTOS is a folder of photographs in any size; some are written anew as 64x64
JPEG files of quality 90, and prepared. Prints a table and writes JSON: images
a second and core (of CPU time, all threads counted), the same for what must be
done at least, and images a second of grain and of tf.data around the same work.
Ways to run ahead are measured in processes of their own, in turns, the median
of several rounds. How long a training step waits, benchmarks/step_time.py
tells.
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
  """IMAGES photographs of a folder as 64x64 JPEG files in two classes."""
  paths = sorted(pathlib.Path(source).rglob("*.jp*g"))[:IMAGES]
  for i, path in enumerate(paths):
    folder = out / f"class{i % 2}"
    folder.mkdir(parents=True, exist_ok=True)
    with PIL.Image.open(path) as image:
      small = image.convert("RGB").resize((SIZE, SIZE), PIL.Image.LANCZOS)
    small.save(folder / f"{i:05d}.jpg", quality=90)


def batches_of(name: str, path: str, threads: int | None = None):
  """Batches of a data set, as training takes them."""
  source = datasets.find(name, path=path, threads=threads).open("train", None)
  return pipeline.Batches(source, 0, BATCH, flip=True)


def cost(make, steps: int) -> float:
  """Images a second of CPU time, all threads counted."""
  make(0)
  began = time.process_time()
  for step in range(1, steps + 1):
    make(step)
  return steps * BATCH / (time.process_time() - began)


def bare_decoding(path: str):
  """What reading JPEG files costs at least: Pillow over the same files."""
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
  """What prepared images cost at least: a copy of pixels in memory."""
  del path
  pixels = np.zeros((IMAGES, SIZE, SIZE, 3), np.uint8)

  def make(step):
    return pixels[pipeline.batch_indices(0, step, BATCH, IMAGES)]

  return make


# Ways to run ahead, each in a process of its own ------------------------------


def _grain(name: str, path: str):
  yield from pipeline.prefetch(batches_of(name, path), 0, 10**6)


def _tf_data(name: str, path: str):
  """tf.data around our batches; JPEG files are decoded by TensorFlow itself."""
  import tensorflow as tf

  if name == "folder":
    files_there = [str(p) for p in sorted(pathlib.Path(path).rglob("*.jpg"))]
    names = tf.constant(files_there)
    n = len(files_there)

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


WAYS = {"grain": _grain, "tf.data": _tf_data}


def measure_way(way: str, name: str, path: str) -> None:
  """Prints images a second, of wall time, after a warm-up."""
  stream = WAYS[way](name, path)
  for _ in range(5):
    next(stream)
  began = time.perf_counter()
  for _ in range(STEPS):
    next(stream)
  print(json.dumps(STEPS * BATCH / (time.perf_counter() - began)))
  os._exit(0)  # Threads of TensorFlow may not end by themselves.


def compare_ways(name: str, path: str) -> dict[str, float]:
  """Images a second of every way, measured in turns."""
  rates = {way: [] for way in WAYS}
  for _ in range(ROUNDS):
    for way, found in rates.items():
      done = subprocess.run(
          [sys.executable, __file__, "--way", way, name, path],
          capture_output=True, text=True, check=True, timeout=300,
      )
      found.append(float(done.stdout.splitlines()[-1]))
  return {way: statistics.median(found) for way, found in rates.items()}


def main() -> None:
  """Measures everything and writes the file."""
  photos, out = sys.argv[1:3]
  result: dict[str, Any] = {"size": SIZE, "batch": BATCH, "images": IMAGES}
  with tempfile.TemporaryDirectory() as folder:
    jpegs, ready = f"{folder}/jpegs", f"{folder}/prepared"
    write_photos(photos, pathlib.Path(jpegs, "train"))
    prepare.main([jpegs, ready, f"--size={SIZE}"])
    # Ours and what must be done at least, in turns.
    kinds = {
        "prepared": (batches_of("prepared", ready), bare_copying(jpegs)),
        "folder": (batches_of("folder", jpegs, 1), bare_decoding(jpegs)),
    }
    for name, makes in kinds.items():
      rates = [[], []]
      for _ in range(ROUNDS):
        for make, found in zip(makes, rates, strict=True):
          found.append(cost(make, 10))
      ours, least = (statistics.median(found) for found in rates)
      result[name] = {
          "images_per_second_and_core": ours,
          "at_least": least,
          "share_of_at_least": ours / least,
          "images_per_second": compare_ways(
              name, ready if name == "prepared" else jpegs
          ),
      }
      print(name, json.dumps(result[name], indent=2))
  files.write_json(os.path.abspath(out), result | provenance.machine())


if __name__ == "__main__":
  if sys.argv[1:2] == ["--way"]:
    measure_way(*sys.argv[2:])
  main()
