"""Steps that are not finite: skipped by the step, counted and judged here.

The step leaves parameters, optimiser and averages as they were where a loss
or gradient is not finite. After several in a row the loop rolls back to the
last good checkpoint and goes on with other data; after several roll-backs
without a new checkpoint it stops and leaves a bundle to look at.
"""

import collections
from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import jax
import numpy as np

from bcm_jax.utils import files

# Steps that the guard looks back, so that it never waits for the device.
_LAG = 2
FOLDER = "diagnostics"


class NotFinite(Exception):
  """Too many steps in a row were skipped.

  Attributes:
    step: the last of them.
    metrics: name -> value there.
  """

  def __init__(self, step: int, in_row: int, metrics: Mapping[str, float]):
    values = ", ".join(f"{k}={v:.4g}" for k, v in sorted(metrics.items()))
    super().__init__(
        f"step {step}: {in_row} steps in a row were not finite ({values})"
    )
    self.step = step
    self.metrics = dict(metrics)


@dataclasses.dataclass
class Guard:
  """Reads a call's metrics two calls later, when they are there anyway.

  Attributes:
    limit: skipped steps in a row that are too many.
  """

  limit: int
  waiting: collections.deque = dataclasses.field(
      default_factory=collections.deque
  )

  def check(self, step: int, metrics: dict[str, Any], wait: bool = False):
    """Takes the metrics of a call that ended with `step`.

    Metrics are scalars, or arrays over the steps of the call.

    Raises:
      NotFinite: over the limit, in this call or one before.
    """
    self.waiting.append((step, metrics))
    while self.waiting and (wait or len(self.waiting) > _LAG):
      last, old = self.waiting.popleft()
      rows = np.atleast_1d(np.asarray(old["skipped_in_row"]))
      for i, in_row in enumerate(rows):
        if in_row >= self.limit:
          values = {
              k: float(np.atleast_1d(np.asarray(v))[i]) for k, v in old.items()
          }
          raise NotFinite(last - len(rows) + 1 + i, int(in_row), values)


def write_bundle(
    workdir: str,
    error: NotFinite,
    state: Any,
    batch: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> str:
  """Writes what helps to find out why steps were not finite.

  Args:
    workdir: of the run.
    error: which step, with its metrics.
    state: the state there, on the host.
    batch: this host's part of the batch of that step.
    facts: JSON values: roll-backs, config, versions, devices.

  Returns:
    The folder: report.json (metrics, norm and count of values that are not
    finite of every tensor) and batch.npz.
  """
  folder = os.path.join(workdir, FOLDER, f"step-{error.step}")
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    values = np.asarray(leaf).astype(np.float64)
    finite = np.isfinite(values)
    tensors[name] = {
        "norm": float(np.linalg.norm(values[finite])),
        "largest": float(np.abs(values[finite]).max(initial=0.0)),
        "not_finite": int((~finite).sum()),
    }
  report = {
      "step": error.step,
      "metrics": {k: repr(v) for k, v in error.metrics.items()},
      **facts, "tensors": tensors,
  }
  files.write_json(os.path.join(folder, "report.json"), report)
  files.write_npz(os.path.join(folder, "batch.npz"), **batch)
  return folder
