"""Points at which a test can kill the process, like a power cut.

TRAINING_FAULT=NAME kills at the first time that point NAME is reached, NAME:N
at its Nth. Without the variable a point costs one dictionary look-up.
"""

import collections
from collections.abc import Callable
import os
from typing import Any

ENVIRONMENT = "TRAINING_FAULT"
# What the shell reports for kill -9.
EXIT_KILLED = 137

# Name -> position; tests kill at each of them.
POINTS = {
    "config_written": "config.json is there, nothing else",
    "before_save": "a checkpoint is due, nothing of it is written",
    "mid_write": "its arrays are being written",
    "after_commit": "it is committed, the loop does not know it yet",
    "metrics_half": "half a line of metrics.jsonl is written",
    "before_rollback": "steps were not finite, the checkpoint is not read yet",
    "before_done": "everything is there but the mark that the run is finished",
}
_reached: collections.Counter = collections.Counter()


def point(name: str, before: Callable[[], Any] = lambda: None) -> None:
  """Kills the process if the environment names this point, after `before`."""
  if name not in POINTS:
    raise KeyError(name)
  wanted, _, count = os.environ.get(ENVIRONMENT, "").partition(":")
  if wanted != name:
    return
  _reached[name] += 1
  if _reached[name] == int(count or 1):
    before()
    os._exit(EXIT_KILLED)
