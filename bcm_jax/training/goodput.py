"""Wall-clock breakdown of a run across restarts.

Each start of a run keeps a file of its own, `goodput/NNNN.json`, written every
few seconds, so that a killed start leaves an account. Unattributed time counts
as training steps, so that the parts add up to the wall time.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import time
from typing import Any

from bcm_jax.utils import files

FOLDER = "goodput"
# Categories other than training steps.
PARTS = ("init", "compile", "data", "checkpoint", "rollback", "eval")
# Time between two writes: the most that a kill leaves unaccounted.
_WRITE_SECS = 10.0


class Goodput:
  """Accounts of one start of a run.

  Args:
    workdir: of the run; None keeps no file (all hosts but one).
    began: time of the start; the time since then is 'init'.
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
    self._first: int | None = None
    self._step = self._done = 0
    self._saved: int | None = None
    self._inside: str | None = None
    self._since = 0.0
    self._path = None
    self._written = self._began
    if workdir is not None:
      folder = os.path.join(workdir, FOLDER)
      number = len(list(pathlib.Path(folder).glob("*.json")))
      self._path = os.path.join(folder, f"{number:04d}.json")

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Accounts the time inside; nested parts belong to the outer one."""
    if self._inside is not None:
      yield
      return
    self._inside, self._since = name, self._clock()
    try:
      yield
    finally:
      self._book()
      self._inside = None

  def _book(self) -> None:
    """Adds the time so far of the current part."""
    if self._inside is not None:
      now = self._clock()
      self._seconds[self._inside] += now - self._since
      self._since = now

  def begin(self, step: int) -> None:
    """Sets the step after which a start or rollback continues."""
    self._first = step if self._first is None else self._first
    self._step = step
    self._write()

  def progress(self, step: int) -> None:
    """Records that steps up to this one are finished."""
    self._done += step - self._step
    self._step = step
    if self._clock() - self._written >= _WRITE_SECS:
      self._write()

  def save(self, step: int, saved: int | None = None) -> None:
    """Writes the account up to a step.

    Args:
      step: last finished step.
      saved: newest step with a checkpoint.
    """
    self._saved = saved
    self.progress(step)
    self._write()

  def _write(self) -> None:
    self._written = self._clock()
    if self._path is None:
      return
    try:
      files.write_json(self._path, self.record())
    except OSError:
      pass  # A full disk is reported by the checkpoint saver.

  def record(self) -> dict[str, Any]:
    """Returns steps, and seconds by part; 'step' is the rest.

    Returns:
      'first' and 'last' step, 'steps' that were done, those that were done
      again counted again; 'saved', the newest step that a checkpoint is known
      to hold; 'wall' and 'seconds'.
    """
    self._book()
    wall = self._clock() - self._began
    step = wall - sum(self._seconds.values())
    return {
        "first": self._first or 0, "last": self._step, "steps": self._done,
        "saved": self._saved, "wall": wall,
        "seconds": self._seconds | {"step": step},
    }


def total(workdir: str) -> dict[str, Any] | None:
  """Sums over all starts of a run; None without accounts.

  Returns:
    'starts', 'last' step, 'wall', 'seconds' by part, 'repeated_steps' (done,
    and done again after a kill or a roll-back), 'goodput': share of the wall
    time in steps that count.
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
  # A killed start may have done more than its last account says: what the next
  # one went on from.
  steps = records[-1]["steps"] + sum(
      max(a["steps"], b["first"] - a["first"])
      for a, b in zip(records, records[1:], strict=False)
  )
  lost = steps - (records[-1]["last"] - records[0]["first"])
  wall = sum(r["wall"] for r in records)
  useful = seconds["step"] * (1 - lost / steps) if steps else 0.0
  return {
      "starts": len(records), "last": records[-1]["last"], "wall": wall,
      "seconds": seconds, "repeated_steps": lost,
      "goodput": useful / wall if wall else 0.0,
  }
