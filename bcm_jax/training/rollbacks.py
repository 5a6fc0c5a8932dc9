"""Roll-backs of a run, on disk: a restart goes on as if it had not happened.

A checkpoint does not know that the steps after it were tried and failed. The
step and window that it holds say which state it is; a record beside the
checkpoints says where in the data that state goes on, and how often it was
tried. Written before the steps are, so no kill lies between.
"""

import dataclasses
import json
import os
import pathlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax import files

FILE = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class Rollback:
  """One return to a saved state.

  Attributes:
    step, window: of the saved state.
    position: first batch to go on with.
    count: roll-backs up to this one since a new step was saved.
  """

  step: int
  window: int
  position: int
  count: int


def last(workdir: str, step: int, window: int) -> Rollback | None:
  """The last roll-back to a state, as process 0 reads it; None if none."""
  found = [
      r for r in _read(workdir) if (r.step, r.window) == (step, window)
  ] if jax.process_index() == 0 else []
  position, count = (found[-1].position, found[-1].count) if found else (0, 0)
  if jax.process_count() > 1:
    position, count = map(int, multihost_utils.broadcast_one_to_all(
        np.array([position, count], np.int32)
    ))
  return Rollback(step, window, position, count) if count else None


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
