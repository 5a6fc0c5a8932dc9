"""Saves that may fail: a full disk must not end a run that could go on."""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import time
from typing import Any

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.training import fault_injection
from bcm_jax.training import multihost


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
  known: list[int] = dataclasses.field(default_factory=list)

  def save(self, step: int, state: Any) -> None:
    """Saves in the background; whether it failed is known at the next save.

    Raises:
      MachineError: too many in a row have failed.
    """
    fault_injection.point("before_save")
    self._settle()
    self._attempt(lambda: self._begin(step, state))

  def steps(self) -> list[int]:
    """Steps that can be read, rising, as all hosts agree."""
    self._settle()
    return self.known

  def finish(self, step: int, state: Any) -> None:
    """Saves and waits until it is there, for the run ends here.

    Raises:
      MachineError: it cannot be written, in as many tries as are left.
    """
    self._settle()
    while step not in self.known:
      began = self._attempt(lambda: self._begin(step, state))
      if not (self._settle() and began):
        self.sleep(self.wait_secs)

  def _begin(self, step: int, state: Any) -> None:
    self.saved.save(step, state, dict(self.meta))
    fault_injection.point("mid_write")

  def _settle(self) -> bool:
    """Waits for the save under way, and looks what is there.

    A new step clears old failures. Only process 0 can tell when a step is
    there, so the others take its word, once it has waited.
    """
    if not self._attempt(self.saved.wait):
      return False
    self.known, before = self.saved.common_steps(), self.newest
    self.newest = max(self.known, default=None)
    if self.known and (before is None or self.newest > before):
      fault_injection.point("after_commit")
      self.failures = 0
    return True

  def _attempt(self, action: Callable[[], Any]) -> bool:
    """Whether an action went well on all hosts; logs and counts failures."""
    problem = None
    try:
      action()
    except TypeError:  # A mistake in the state, not the disk's.
      raise
    except Exception as e:  # Orbax raises bare Exceptions.
      problem = e
    if multihost.all_agree(problem is None):
      return True
    self.failures += 1
    text = " ".join(str(problem or "on another host").split())
    if len(text) > 300:  # The cause stands at the end, after paths.
      text = f"{text[:60]} ... {text[-240:]}"
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
