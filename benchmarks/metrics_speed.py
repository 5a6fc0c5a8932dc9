"""How long metrics take, beside bare matrix products of as many operations.

  python benchmarks/metrics_speed.py docs/results/metrics_speed.json [section..]

Runs the sections named, or all, prints a table and writes JSON; sections of
the file that were not run stay as they are. Each section measures the float64
matrix product itself, so that a busy machine shows in both columns.
"""

from collections.abc import Callable
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import numpy as np
import scipy

from bcm_jax import __version__
from bcm_jax import files
from bcm_jax.metrics import frechet
from bcm_jax.metrics import moments
from bcm_jax.metrics import precision_recall

DIMENSION = 2048


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
  """The shortest of some runs."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return min(times)


def product_seconds(operations: float) -> float:
  """Time that NumPy takes for this many operations in float64 products."""
  a, b = np.random.default_rng(0).standard_normal((2, DIMENSION, DIMENSION))
  one = seconds(lambda: a @ b, repeats=5)
  return one * operations / (2 * DIMENSION**3)


def random_features(count: int, seed: int) -> np.ndarray:
  """float32 [count, DIMENSION] of falling variance, as features have."""
  scales = np.geomspace(1.0, 1e-3, DIMENSION, dtype=np.float32)
  rng = np.random.default_rng(seed)
  return scales * rng.standard_normal((count, DIMENSION), np.float32)


def frechet_distance() -> dict[str, float]:
  """From two arrays of 50,000 features to the distance."""
  count = 50_000
  sets = [random_features(count, seed) for seed in range(2)]
  # What the products of both covariances would take without their symmetry.
  bare = product_seconds(2 * 2 * count * DIMENSION**2)
  gaussians = []

  def statistics():
    gaussians[:] = [moments.from_features(s).gaussian() for s in sets]

  covariances = seconds(statistics)
  distance = seconds(lambda: frechet.frechet_distance(*gaussians))
  return {
      "images": count,
      "seconds": covariances + distance,
      "seconds_of_covariances": covariances,
      "seconds_of_distance": distance,
      "seconds_of_products": bare,
  }


def neighbours() -> dict[str, float]:
  """Precision, recall, density and coverage of 10,000 features each."""
  count = 10_000
  real, fake = (random_features(count, seed) for seed in range(2))
  # All pairs between the sets, half of all pairs within each.
  bare = product_seconds(2 * 2 * count**2 * DIMENSION)
  return {
      "images": count,
      "seconds": seconds(lambda: precision_recall.prdc(real, fake)),
      "seconds_of_products": bare,
  }


SECTIONS = {
    "frechet_distance": frechet_distance,
    "precision_recall_density_coverage": neighbours,
}


def facts() -> dict[str, Any]:
  """Hardware, versions and commit of this run."""
  cpu = next(
      (line.split(":")[1].strip()
       for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
       if line.startswith("model name")), platform.machine(),
  ) if os.path.exists("/proc/cpuinfo") else platform.machine()
  commit = subprocess.run(
      ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "HEAD"],
      capture_output=True, text=True, check=False,
  ).stdout.strip()
  return {
      "cpu": cpu, "cores": os.cpu_count(), "bcm_jax": __version__,
      "numpy": np.__version__, "scipy": scipy.__version__, "commit": commit,
  }


def main() -> None:
  """Measures, prints and writes."""
  path = pathlib.Path(sys.argv[1]).resolve()
  result = json.loads(path.read_text()) if path.exists() else {}
  print(f"{'section':<36} {'seconds':>8} {'products':>9} {'ratio':>6}")
  for name in sys.argv[2:] or SECTIONS:
    found = SECTIONS[name]()
    taken, bare = found["seconds"], found["seconds_of_products"]
    print(f"{name:<36} {taken:>8.1f} {bare:>9.1f} {taken / bare:>6.2f}")
    result[name] = found | facts()
    files.write_json(str(path), result)


if __name__ == "__main__":
  main()
