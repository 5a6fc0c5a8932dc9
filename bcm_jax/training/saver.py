"""Saves that may fail: a full disk must not end a run that could go on."""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import time
from typing import Any

from bcm_jax import errors
from bcm_jax.training import checkpoint
from bcm_jax.training import faults
from bcm_jax.training import hosts


@dataclasses.dataclass
class Saver:
  """Checkpoints of a run; failures are tried again, a bounded number of times.

  Attributes:
    saved: where they go.
    meta: facts to keep with each.
    most: failures in a row after which the run stops.
    wait_secs: between tries of a save that must succeed.
  """

  saved: checkpoint.Checkpoints
  meta: Mapping[str, Any]
  most: int = 3
  wait_secs: float = 10.0
  sleep: Callable[[float], Any] = time.sleep
  failures: int = 0
  newest: int | None = None

  def save(self, step: int, state: Any) -> None:
    """Saves in the background; whether it failed is known at the next save.

    Raises:
      MachineError: too many in a row have failed.
    """
    faults.point("before_save")
    self._attempt(self._settle)
    self._attempt(lambda: self._begin(step, state))

  def steps(self) -> list[int]:
    """Steps that can be read, rising, as all hosts agree."""
    self._attempt(self._settle)
    return self.saved.common_steps()

  def finish(self, step: int, state: Any) -> None:
    """Saves and waits until it is there, for the run ends here.

    Raises:
      MachineError: it cannot be written, in as many tries as are left.
    """
    self._attempt(self._settle)
    while self.newest != step:
      if not self._attempt(lambda: (self._begin(step, state), self._settle())):
        self.sleep(self.wait_secs)

  def _begin(self, step: int, state: Any) -> None:
    self.saved.save(step, state, dict(self.meta))
    faults.point("mid_write")

  def _settle(self) -> None:
    """Waits for the save under way; a new step clears old failures."""
    self.saved.wait()
    newest = self.saved.latest_step()
    if newest is not None and newest != self.newest:
      faults.point("after_commit")
      self.newest, self.failures = newest, 0

  def _attempt(self, action: Callable[[], Any]) -> bool:
    """Whether an action went well on all hosts; logs and counts failures."""
    problem = None
    try:
      action()
    except TypeError:  # A mistake in the state, not the disk's.
      raise
    except Exception as e:  # Orbax raises bare Exceptions.
      problem = e
    if hosts.all_agree(problem is None):
      return True
    self.failures += 1
    text = " ".join(str(problem or "on another host").split())[:300]
    logging.error(
        "a checkpoint could not be written to %s (%s); failure %d of %d",
        self.saved.directory, text, self.failures, self.most,
    )
    if self.failures >= self.most:
      raise errors.MachineError(
          f"{self.failures} checkpoints in a row could not be written to "
          f"{self.saved.directory} ({text}); the newest is of step "
          f"{self.newest}. Make room or mend the disk, then start again"
      ) from problem
    return False
