"""Weights and images of lpips.npz, the same with torch and without it."""

import zlib

import numpy as np


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of VGG16 or of the linear layers, seeded by its name."""
  z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.startswith("lin"):
    z = np.abs(z)
  else:
    z = z * (0.1 if name.endswith("bias") else np.sqrt(2 / np.prod(shape[1:])))
  return z.astype(np.float32)


def images() -> np.ndarray:
  """Two pairs [2, 2, 19, 34, 3] in [-1, 1]; the second pair is much alike."""
  pairs = np.random.default_rng(3).uniform(-1, 1, (2, 2, 19, 34, 3))
  pairs[1, 1] = 0.95 * pairs[0, 1] + 0.05 * pairs[1, 1]
  return pairs.astype(np.float32)
