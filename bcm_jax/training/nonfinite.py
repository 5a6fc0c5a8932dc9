"""Counts consecutive non-finite steps; records rollbacks and diagnostics.

The step leaves parameters, optimizer and averages unchanged where a loss or
gradient is not finite. After several in a row the loop rolls back to the last
good checkpoint and continues with other data; after several rollbacks without a
new checkpoint it stops and writes a bundle for inspection.
"""

import collections
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax.utils import files

# Calls by which the guard lags, so that it never waits for the device.
_LAG = 2
# Folder and file of the work directory.
FOLDER = "diagnostics"
ROLLBACKS = "rollbacks.json"


class NotFinite(Exception):
  """Too many consecutive steps were not finite.

  Attributes:
    step: the last of them.
    metrics: name -> value at that step.
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
  """Checks the metrics of each call two calls later, when they are ready.

  Attributes:
    limit: number of consecutive skipped steps that raises NotFinite.
  """

  limit: int
  waiting: collections.deque = dataclasses.field(
      default_factory=collections.deque
  )

  def check(self, step: int, metrics: dict[str, Any], wait: bool = False):
    """Adds the metrics of a call that ended with `step`.

    Args:
      step: last step of the call.
      metrics: scalars, or arrays over the steps of the call.
      wait: check this call too.

    Raises:
      NotFinite: the limit was reached, in this call or one before.
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
  """Writes diagnostics of a non-finite step.

  Args:
    workdir: of the run.
    error: the step and its metrics.
    state: the state at that step, on the host.
    batch: this host's part of the batch of that step.
    facts: JSON values: rollbacks, config, versions, devices.

  Returns:
    The folder: report.json (metrics; norm and number of non-finite values of
    every tensor) and batch.npz.
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


@dataclasses.dataclass(frozen=True)
class Rollback:
  """One return to a saved state, recorded before the steps are tried again.

  A checkpoint does not record that the steps after it failed. Its step and
  offset identify it; the record says at which data the state continues and how
  often the run has failed since it made progress, so that a restart repeats the
  same rollbacks.

  Attributes:
    step, data_offset: of the saved state.
    position: first batch to continue with.
    reached: greatest step that was saved by then; reaching it again from an
      older state is no progress.
    count: rollbacks since the last progress, this one included.
  """

  step: int
  data_offset: int
  position: int
  reached: int
  count: int


def rollback_history(workdir: str) -> list[Rollback]:
  """Returns all rollbacks, oldest first, as process 0 reads them."""
  rows = _read_rollbacks(workdir) if jax.process_index() == 0 else []
  if jax.process_count() == 1:
    return rows
  share = multihost_utils.broadcast_one_to_all
  width = len(dataclasses.fields(Rollback))
  table = np.zeros((int(share(np.int32(len(rows)))), width), np.int32)
  for i, row in enumerate(rows):
    table[i] = dataclasses.astuple(row)
  return [Rollback(*map(int, row)) for row in share(table)]


def rollback_to(
    rollbacks: list[Rollback], step: int, data_offset: int
) -> Rollback | None:
  """Returns the last rollback to a state, or None."""
  matches = [
      r for r in rollbacks if (r.step, r.data_offset) == (step, data_offset)
  ]
  return matches[-1] if matches else None


def rollbacks_without_progress(
    rollbacks: list[Rollback], newest: int
) -> tuple[int, int]:
  """Returns (rollbacks since the last progress, greatest step saved in them).

  Args:
    rollbacks: of the run.
    newest: saved step, 0 for none.
  """
  if rollbacks and newest <= rollbacks[-1].reached:
    return rollbacks[-1].count, rollbacks[-1].reached
  return 0, newest


def add_rollback(workdir: str, rollback: Rollback) -> None:
  """Appends a rollback to the record; only process 0 writes."""
  if jax.process_index() == 0:
    files.write_json(
        os.path.join(workdir, ROLLBACKS),
        [dataclasses.asdict(r) for r in (*_read_rollbacks(workdir), rollback)],
    )


def _read_rollbacks(workdir: str) -> list[Rollback]:
  path = pathlib.Path(workdir) / ROLLBACKS
  if not path.exists():
    return []
  return [Rollback(**r) for r in json.loads(path.read_text())]
