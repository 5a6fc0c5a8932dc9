"""Fault injection: points at which a test can kill the process.

TRAINING_FAULT=NAME kills the process when point NAME is reached for the first
time, NAME:N when it is reached for the Nth time. Without the variable, a point
costs one dictionary look-up.
"""

import collections
from collections.abc import Callable
import os
from typing import Any

ENVIRONMENT = "TRAINING_FAULT"
# Exit status that a shell reports after kill -9.
EXIT_KILLED = 137

# Name -> state of the work directory at that point; tests kill at each point.
POINTS = {
    "config_written": "only config.json exists",
    "before_save": "a checkpoint is due, its write has not started",
    "mid_write": "the arrays of a checkpoint are being written",
    "after_commit": "a checkpoint is committed, before the loop is notified",
    "metrics_half": "half a line of metrics.jsonl is written",
    "before_rollback": "steps were not finite, the checkpoint is not read yet",
    "before_done": "every file exists except DONE",
}
_reached: collections.Counter = collections.Counter()


def point(name: str, before: Callable[[], Any] = lambda: None) -> None:
  """Kills the process if TRAINING_FAULT selects this point.

  Args:
    name: key of POINTS.
    before: called immediately before the kill, for example to leave a partial
      write behind.

  Raises:
    KeyError: unknown name.
  """
  if name not in POINTS:
    raise KeyError(name)
  selected, _, count = os.environ.get(ENVIRONMENT, "").partition(":")
  if selected != name:
    return
  _reached[name] += 1
  if _reached[name] == int(count or 1):
    before()
    os._exit(EXIT_KILLED)
