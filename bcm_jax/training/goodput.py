"""Wall-clock breakdown of a run across restarts.

Every start of a run writes its own file, `goodput/NNNN.json`, every few
seconds, so that a killed start also leaves a record. Time that is not
attributed to another category counts as training steps; the categories
therefore add up to the wall time.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import math
import os
import pathlib
import time
from typing import Any

from bcm_jax.utils import files

FOLDER = "goodput"
# Categories of time other than training steps.
PARTS = ("init", "compile", "data", "checkpoint", "rollback", "eval")
# Interval of the writes; a kill loses at most this much of the record.
_WRITE_SECS = 10.0


class Goodput:
  """Time record of one start of a run.

  Args:
    workdir: work directory; None writes no file (all hosts except process 0).
    began: clock value at the start of the process; the time since then counts
      as 'init'. None is now.
    clock: returns monotonic seconds.
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
    """Attributes the time inside to a category of PARTS.

    Time in a nested context counts for the outer one.
    """
    if self._inside is not None:
      yield
      return
    self._inside, self._since = name, self._clock()
    try:
      yield
    finally:
      self._add_elapsed()
      self._inside = None

  def _add_elapsed(self) -> None:
    """Adds the time since the last call to the current category, if any."""
    if self._inside is not None:
      now = self._clock()
      self._seconds[self._inside] += now - self._since
      self._since = now

  def begin(self, step: int) -> None:
    """Sets the step after which training starts, or continues after a rollback.
    """
    self._first = step if self._first is None else self._first
    self._step = step
    self._write()

  def progress(self, step: int) -> None:
    """Records that all steps up to this one are finished."""
    self._done += step - self._step
    self._step = step
    if self._clock() - self._written >= _WRITE_SECS:
      self._write()

  def save(self, step: int, saved: int | None = None) -> None:
    """Writes the record up to a step.

    Args:
      step: last finished step.
      saved: step of the newest committed checkpoint, None if unknown.
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
    """Returns the record of this start.

    Returns:
      'first': step before the first one trained. 'last': last finished step.
      'steps': number of steps trained, including repeated ones. 'saved': step
      of the newest committed checkpoint, or None. 'wall': seconds. 'seconds':
      category -> seconds, with 'step' for the unattributed time.
    """
    self._add_elapsed()
    wall = self._clock() - self._began
    step = wall - sum(self._seconds.values())
    return {
        "first": self._first or 0, "last": self._step, "steps": self._done,
        "saved": self._saved, "wall": wall,
        "seconds": self._seconds | {"step": step},
    }


def _check(record: Any) -> dict[str, Any]:
  """Returns a record of `Goodput.record`; raises ValueError if it is not one.
  """
  try:
    numbers = [record[k] for k in ("first", "last", "steps", "wall")]
    numbers += [record["seconds"][k] for k in (*PARTS, "step")]
  except (TypeError, KeyError) as e:
    raise ValueError("not a record") from e
  if not all(
      type(x) in (int, float) and math.isfinite(x) and abs(x) < 2**63
      for x in numbers
  ):
    raise ValueError("a value is not a number")
  return record


def total(workdir: str) -> dict[str, Any] | None:
  """Sums the records of all starts of a run.

  Returns:
    None without a record, else 'starts': number of starts. 'last': last
    finished step. 'wall': seconds. 'seconds': category -> seconds.
    'repeated_steps': steps trained again after a kill or a rollback.
    'goodput': fraction of the wall time spent in steps that were not repeated.
  """
  records = []
  for path in sorted((pathlib.Path(workdir) / FOLDER).glob("*.json")):
    try:
      records.append(_check(files.read_json(path)))
    except (OSError, ValueError) as e:
      logging.warning("%s is left out of the time accounting: %s", path, e)
  if not records:
    return None
  seconds = {
      name: sum(r["seconds"][name] for r in records)
      for name in (*PARTS, "step")
  }
  # A killed start may have trained more steps than its last record has; the
  # next start continues from a checkpoint of these.
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
