"""Small image files, and what many threads do, for tests of data sources."""

from concurrent.futures import ThreadPoolExecutor
import io
import pathlib
import sys

import numpy as np
from PIL import Image


def noise(seed: int, height: int = 8, width: int = 8, channels: int = 3):
  """Random pixels, uint8 [height, width, channels]."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def encode(pixels: np.ndarray, kind: str = "png", **options) -> bytes:
  """An image file with these pixels, uint8 [H, W, C]."""
  picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1
                            else pixels)
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return buffer.getvalue()


def write(path: pathlib.Path, pixels: np.ndarray) -> np.ndarray:
  """Writes a PNG, with the folders above it, and returns its pixels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encode(pixels))
  return pixels


def write_classes(root: pathlib.Path, classes: dict[str, int], **shape):
  """Writes a folder a class; returns (pixels, labels) in the right order."""
  pixels, labels = [], []
  for label, name in enumerate(sorted(classes)):
    for k in range(classes[name]):
      seed = 1000 * label + k
      picture = noise(seed, **shape)
      pixels.append(write(root / name / f"{k:03d}.png", picture))
      labels.append(label)
  return np.stack(pixels), labels


def fetch_from_threads(source, images, labels, batch_size: int) -> bool:
  """Whether threads that interrupt each other all get what they ask for."""

  def read(seed):
    ids = np.random.default_rng(seed).integers(0, len(source), batch_size)
    got = source.fetch(ids)
    return np.array_equal(got["image"], images[ids]) and np.array_equal(
        got["label"], labels[ids]
    )

  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    with ThreadPoolExecutor(8) as pool:
      return all(pool.map(read, range(60)))
  finally:
    sys.setswitchinterval(interval)
