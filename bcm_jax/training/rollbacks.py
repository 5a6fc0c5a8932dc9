"""Roll-backs of a run, on disk: a restart goes on as if it had not happened.

A checkpoint does not know that the steps after it were tried and failed. The
step and offset that it holds say which state it is; a record beside the
checkpoints says where in the data that state goes on, and how often the run
has failed to get further. Written before the steps are tried.
"""

import dataclasses
import json
import os
import pathlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax.utils import files

FILE = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class Rollback:
  """One return to a saved state.

  Attributes:
    step, data_offset: of the saved state.
    position: first batch to go on with.
    reached: greatest step that was saved by then. A run that comes so far
      again, from an older state, has not got further.
    count: roll-backs up to this one since it got further.
  """

  step: int
  data_offset: int
  position: int
  reached: int
  count: int


def history(workdir: str) -> list[Rollback]:
  """All roll-backs, the first one first, as process 0 reads them."""
  rows = _read(workdir) if jax.process_index() == 0 else []
  if jax.process_count() == 1:
    return rows
  share = multihost_utils.broadcast_one_to_all
  width = len(dataclasses.fields(Rollback))
  table = np.zeros((int(share(np.int32(len(rows)))), width), np.int32)
  for i, row in enumerate(rows):
    table[i] = dataclasses.astuple(row)
  return [Rollback(*map(int, row)) for row in share(table)]


def of_state(
    rollbacks: list[Rollback], step: int, data_offset: int
) -> Rollback | None:
  """The last roll-back to a state; None if there was none."""
  found = [
      r for r in rollbacks if (r.step, r.data_offset) == (step, data_offset)
  ]
  return found[-1] if found else None


def in_row(rollbacks: list[Rollback], newest: int) -> tuple[int, int]:
  """(roll-backs since the run got further, greatest step saved in them).

  Args:
    rollbacks: of the run.
    newest: step that is saved, 0 for none.
  """
  if rollbacks and newest <= rollbacks[-1].reached:
    return rollbacks[-1].count, rollbacks[-1].reached
  return 0, newest


def add(workdir: str, rollback: Rollback) -> None:
  """Writes a roll-back down; process 0 does it for all."""
  if jax.process_index() == 0:
    files.write_json(
        os.path.join(workdir, FILE),
        [dataclasses.asdict(r) for r in (*_read(workdir), rollback)],
    )


def _read(workdir: str) -> list[Rollback]:
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    return []
  return [Rollback(**r) for r in json.loads(path.read_text())]
