"""Where the time of a run went, over all its starts.

Each start of a run keeps a file of its own, `goodput/NNNN.json`, so that one
that is killed leaves its last account. Seconds that belong to nothing else are
those of the steps; so the parts add up to the wall time.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import time
from typing import Any

from bcm_jax import files

FOLDER = "goodput"
# What a step is not.
PARTS = ("init", "compile", "data", "checkpoint", "rollback", "eval")


class Goodput:
  """Accounts of one start of a run.

  Args:
    workdir: of the run; None keeps no file (all hosts but one).
    began: when the start began; what was since then is 'init'.
    clock: seconds.
  """

  def __init__(
      self,
      workdir: str | None,
      began: float | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    self._clock = clock
    self._began = clock() if began is None else began
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._seconds["init"] = clock() - self._began
    self._first = self._step = 0
    self._inside = None
    self._path = None
    if workdir is not None:
      folder = os.path.join(workdir, FOLDER)
      number = len(list(pathlib.Path(folder).glob("*.json")))
      self._path = os.path.join(folder, f"{number:04d}.json")

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Books what happens inside; parts inside parts belong to the outer."""
    if self._inside is not None:
      yield
      return
    self._inside, start = name, self._clock()
    try:
      yield
    finally:
      self._seconds[name] += self._clock() - start
      self._inside = None

  def begin(self, step: int) -> None:
    """Steps start after this one."""
    self._first = self._step = step

  def save(self, step: int, saved: int | None = None) -> None:
    """Writes the account up to a step.

    Args:
      step: last finished step.
      saved: newest step that a checkpoint holds.
    """
    self._step = step
    if self._path is None:
      return
    try:
      files.write_json(self._path, self.record() | {"saved": saved})
    except OSError:
      pass  # A full disk is the checkpoints' business.

  def record(self) -> dict[str, Any]:
    """First and last step, seconds by part, 'step' being the rest."""
    wall = self._clock() - self._began
    step = wall - sum(self._seconds.values())
    return {
        "first": self._first, "last": self._step, "wall": wall,
        "seconds": self._seconds | {"step": step},
    }


def total(workdir: str) -> dict[str, Any] | None:
  """Sums over all starts of a run; None where there is no account.

  Returns:
    'starts', 'wall', 'seconds' by part, 'lost_steps' (finished but not saved
    when the run ended, and done again), 'goodput': share of the wall time in
    steps that count.
  """
  records = []
  for path in sorted((pathlib.Path(workdir) / FOLDER).glob("*.json")):
    try:
      records.append(json.loads(path.read_text()))
    except ValueError:
      continue
  if not records:
    return None
  seconds: dict[str, float] = {}
  for record in records:
    for name, value in record["seconds"].items():
      seconds[name] = seconds.get(name, 0.0) + value
  lost = sum(
      max(a["last"] - b["first"], 0)
      for a, b in zip(records, records[1:], strict=False)
  )
  steps = sum(r["last"] - r["first"] for r in records)
  wall = sum(r["wall"] for r in records)
  useful = seconds["step"] * (1 - lost / steps) if steps else 0.0
  return {
      "starts": len(records), "wall": wall, "seconds": seconds,
      "lost_steps": lost, "goodput": useful / wall if wall else 0.0,
  }
