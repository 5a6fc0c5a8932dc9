"""Counts consecutive non-finite steps; records rollbacks and diagnostics.

The training step leaves parameters, optimizer state and averages unchanged if a
loss, gradient or updated parameter is not finite. After several consecutive
non-finite steps the loop rolls back to the last good checkpoint and continues
with other data; after several rollbacks without a new checkpoint it stops and
writes diagnostics.
"""

import collections
from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax import errors
from bcm_jax.training import multihost
from bcm_jax.utils import files

# The guard checks a call this many calls later, so as not to wait for the
# device.
_LAG = 2
# Folder and file in the work directory.
FOLDER = "diagnostics"
ROLLBACKS = "rollbacks.json"


class NotFinite(Exception):
  """Too many consecutive steps were not finite.

  Attributes:
    step: the last non-finite step.
    in_row: number of consecutive non-finite steps up to it.
    metrics: name -> value at that step.
  """

  def __init__(self, step: int, in_row: int, metrics: Mapping[str, float]):
    values = ", ".join(f"{k}={v:.4g}" for k, v in sorted(metrics.items()))
    super().__init__(
        f"step {step}: {in_row} steps in a row were not finite ({values})"
    )
    self.step = step
    self.in_row = in_row
    self.metrics = dict(metrics)


@dataclasses.dataclass
class Guard:
  """Checks the metrics of each call two calls later, when they are computed.

  Attributes:
    limit: number of consecutive skipped steps that raises NotFinite.
    waiting: (last step, metrics) of the calls that are not checked yet.
  """

  limit: int
  waiting: collections.deque = dataclasses.field(
      default_factory=collections.deque
  )

  def check(
      self,
      step: int,
      metrics: dict[str, Any],
      wait: bool = False,
      last: bool = False,
  ) -> None:
    """Queues the metrics of a call and checks those of earlier calls.

    Args:
      step: last step of the call.
      metrics: name -> scalar, or array [steps of the call].
      wait: whether to wait for this call and check it, too.
      last: whether `step` is the last one of the run, which must be finite: a
        run does not end in the middle of a streak.

    Raises:
      NotFinite: a checked call reached the limit.
    """
    self.waiting.append((step, metrics))
    while self.waiting and (wait or len(self.waiting) > _LAG):
      end, old = self.waiting.popleft()
      rows = np.atleast_1d(np.asarray(old["skipped_in_row"]))
      for i, in_row in enumerate(map(int, rows)):
        at = end - len(rows) + 1 + i
        if in_row >= (1 if last and at == step else self.limit):
          values = {
              k: float(np.atleast_1d(np.asarray(v))[i]) for k, v in old.items()
          }
          raise NotFinite(at, in_row, values)


def write_bundle(
    workdir: str,
    error: NotFinite,
    state: Any,
    batch: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> str:
  """Writes diagnostics of a non-finite step.

  Args:
    workdir: work directory.
    error: the step and its metrics.
    state: training state at that step, on the host.
    batch: this host's part of the batch of that step.
    facts: JSON values to include: rollbacks, config, versions, devices.

  Returns:
    Path of the folder with report.json (metrics; norm, largest magnitude and
    number of non-finite values of each tensor) and batch.npz.
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
  """A rollback to a saved state, logged before training continues from it.

  A checkpoint contains no record of the failed steps after it. This log maps a
  checkpoint, identified by step and data_offset, to the data position at which
  training continues, so that a restart repeats the same rollbacks.

  Attributes:
    step: step of the saved state.
    data_offset: data_offset of the saved state.
    position: index of the first batch to continue with.
    reached: greatest step saved before this rollback, also within the streak
      that led to it. A run makes progress only by saving a later step outside
      of a streak.
    count: rollbacks since the last progress, including this one.
  """

  step: int
  data_offset: int
  position: int
  reached: int
  count: int


def rollback_history(workdir: str) -> list[Rollback]:
  """Returns all rollbacks, oldest first, on all processes; process 0 reads.

  Raises:
    UserError: rollbacks.json is damaged.
  """
  rows, error = [], None
  if jax.process_index() == 0:
    try:
      rows = _read_rollbacks(workdir)
    except errors.UserError as e:
      error = e
  multihost.raise_everywhere(error)
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
  """Returns the last rollback to the state (step, data_offset), or None."""
  matches = [
      r for r in rollbacks if (r.step, r.data_offset) == (step, data_offset)
  ]
  return matches[-1] if matches else None


def rollbacks_without_progress(
    rollbacks: list[Rollback], newest: int
) -> tuple[int, int]:
  """Counts rollbacks since the run last saved a later step.

  Args:
    rollbacks: all rollbacks, oldest first.
    newest: newest step saved outside of the streak that leads to the next
      rollback, 0 without such a checkpoint.

  Returns:
    (number of rollbacks since the last progress, greatest step ever saved).
  """
  if rollbacks and newest <= rollbacks[-1].reached:
    return rollbacks[-1].count, rollbacks[-1].reached
  return 0, newest


def add_rollback(workdir: str, rollback: Rollback) -> None:
  """Appends a rollback to rollbacks.json; only process 0 writes."""
  if jax.process_index() == 0:
    files.write_json(
        os.path.join(workdir, ROLLBACKS),
        [dataclasses.asdict(r) for r in (*_read_rollbacks(workdir), rollback)],
    )


def _read_rollbacks(workdir: str) -> list[Rollback]:
  path = os.path.join(workdir, ROLLBACKS)
  if not os.path.exists(path):
    return []
  try:
    content = files.read_json(path)
    if not isinstance(content, list):
      raise ValueError("not a list")
    rows = [Rollback(**r) for r in content]
    if any(
        type(x) is not int or not 0 <= x < 2**31
        for row in rows for x in dataclasses.astuple(row)
    ):
      raise ValueError("a value is not a number of steps")
  except (ValueError, TypeError) as e:
    raise errors.UserError(
        f"{path}: got a damaged file ({e}), expected the rollbacks of the run; "
        "restore it from a backup, or remove it to try the same data again"
    ) from e
  return rows
