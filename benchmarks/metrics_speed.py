"""Time of metrics, compared with matrix products of as many operations.

  python benchmarks/metrics_speed.py docs/results/metrics_speed.json [section..]

Runs the named sections, or all, prints a table and writes JSON; other sections
of the file are kept. Times are seconds, the minimum over a few rounds in which
metric and products alternate. On a shared machine set OPENBLAS_NUM_THREADS=1:
threads that wait for each other make decompositions ten times slower, and the
CPU time of one thread equals the wall time on an idle core.
"""

from collections.abc import Callable
import json
import math
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
from bcm_jax.metrics import fid
from bcm_jax.metrics import moments
from bcm_jax.metrics import precision_recall
from bcm_jax.utils import files

DIMENSION = 2048
ROUNDS = 3


def best(**tasks: Callable[[], Any]) -> dict[str, float]:
  """Returns the minimal wall time of each task, and CPU time as '<task> cpu'.

  Tasks alternate, so that load of the machine affects all of them.
  """
  times = {}
  for _ in range(ROUNDS):
    for name, task in tasks.items():
      wall, cpu = time.perf_counter(), time.process_time()
      task()
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      times[name] = min(times.get(name, math.inf), wall)
      times[f"{name} cpu"] = min(times.get(f"{name} cpu", math.inf), cpu)
  return times


def products(operations: float) -> Callable[[], None]:
  """float64 matrix products with this total of operations."""
  a, b = np.random.default_rng(0).standard_normal((2, DIMENSION, DIMENSION))
  repeats = round(operations / (2 * DIMENSION**3))

  def multiply():
    for _ in range(repeats):
      np.matmul(a, b)

  return multiply


def random_features(count: int, seed: int) -> np.ndarray:
  """float32 [count, DIMENSION] of decaying variance, like network features."""
  scales = np.geomspace(1.0, 1e-3, DIMENSION, dtype=np.float32)
  rng = np.random.default_rng(seed)
  return scales * rng.standard_normal((count, DIMENSION), np.float32)


def frechet_distance() -> dict[str, float]:
  """Time from two arrays of 50,000 features to the distance."""
  count = 50_000
  sets = [random_features(count, seed) for seed in range(2)]
  gaussians = []

  def covariances():
    gaussians[:] = [moments.from_features(s).gaussian() for s in sets]

  times = best(
      covariances=covariances,
      distance=lambda: fid.frechet_distance(*gaussians),
      # Operations of both covariances, not using their symmetry.
      products=products(2 * 2 * count * DIMENSION**2),
  )
  total = {
      f"all{clock}": times[f"covariances{clock}"] + times[f"distance{clock}"]
      for clock in ("", " cpu")
  }
  return {"images": count} | total | times


def prdc() -> dict[str, float]:
  """Time of precision, recall, density and coverage of 10,000 features."""
  count = 10_000
  real, fake = (random_features(count, seed) for seed in range(2))
  times = best(
      all=lambda: precision_recall.prdc(real, fake),
      # All pairs between the sets, half of all pairs within each set.
      products=products(2 * 2 * count**2 * DIMENSION),
  )
  return {"images": count} | times


SECTIONS = {
    "frechet_distance": frechet_distance,
    "precision_recall_density_coverage": prdc,
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
      "cpu": cpu, "cores": os.cpu_count(),
      "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
      "bcm_jax": __version__,
      "numpy": np.__version__, "scipy": scipy.__version__, "commit": commit,
  }


def main() -> None:
  """Runs the command."""
  path = pathlib.Path(sys.argv[1]).resolve()
  result = json.loads(path.read_text()) if path.exists() else {}
  print(f"{'seconds':<36} {'all':>8} {'products':>9} {'ratio':>6}")
  for name in sys.argv[2:] or SECTIONS:
    times = SECTIONS[name]()
    for clock in ("", " cpu"):
      metric, bound = times[f"all{clock}"], times[f"products{clock}"]
      print(f"{name + clock:<36} {metric:>8.1f} {bound:>9.1f} "
            f"{metric / bound:>6.2f}")
    result[name] = times | facts()
    files.write_json(str(path), result)


if __name__ == "__main__":
  main()
