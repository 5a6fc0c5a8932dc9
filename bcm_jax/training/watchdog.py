"""Watchdog: ends a process without progress and writes the stacks of threads.

A collective that waits for a dead peer, a blocked disk or a deadlock raises no
exception. The launcher restarts the run.
"""

from collections.abc import Callable, Iterator
import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Any

from bcm_jax import errors

# Factor on the timeout for faulthandler, whose thread runs even if the Python
# interpreter is blocked.
_BACKSTOP = 1.5


class Watchdog:
  """Monitors progress in a background thread.

  Args:
    secs: seconds without progress after which the process ends; 0 disables it.
    file: file for the stacks of all threads, which also go to stderr.
    clock: returns monotonic seconds; replaced by tests.
    end: exits the process with a status; replaced by tests.
  """

  def __init__(
      self,
      secs: float,
      file: str,
      clock: Callable[[], float] = time.monotonic,
      end: Callable[[int], Any] = os._exit,
  ):
    self._secs = secs
    self._file = file
    self._clock = clock
    self._end = end
    self._last = clock()
    self._step = 0
    self._paused = 0
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None

  def start(self) -> "Watchdog":
    """Starts monitoring; returns self."""
    self._last = self._clock()
    if self._secs:
      self._arm()
      self._thread = threading.Thread(
          target=self._watch, name="watchdog", daemon=True
      )
      self._thread.start()
    return self

  def progress(self, step: int) -> None:
    """Records that a step is finished."""
    self._step = step
    self._last = self._clock()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Suspends the timeout in the context, for example between retries."""
    self._paused += 1
    try:
      yield
    finally:
      self._paused -= 1
      self._last = self._clock()

  def close(self) -> None:
    """Stops monitoring."""
    self._stop.set()
    faulthandler.cancel_dump_traceback_later()
    if self._thread is not None:
      self._thread.join()
      self._thread = None

  def _watch(self) -> None:
    while not self._stop.wait(min(self._secs / 4, 5.0)):
      if self._paused or self._clock() - self._last <= self._secs:
        self._arm()
        continue
      self._report()
      self._end(errors.EXIT_HANGING)
      return

  def _arm(self) -> None:
    faulthandler.dump_traceback_later(
        _BACKSTOP * self._secs, exit=True, file=sys.__stderr__
    )

  def _report(self) -> None:
    print(
        f"error: training.watchdog_timeout_secs: no step finished for "
        f"{self._secs:.0f} s after step {self._step}; the stacks of all "
        f"threads follow and are in {self._file}; exit status "
        f"{errors.EXIT_HANGING}",
        file=sys.stderr, flush=True,
    )
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    try:
      os.makedirs(os.path.dirname(self._file), exist_ok=True)
      with open(self._file, "w", encoding="utf-8") as out:
        faulthandler.dump_traceback(out, all_threads=True)
    except OSError as e:  # The disk may be full or the cause of the hang.
      print(f"error: {self._file}: {e.strerror}", file=sys.stderr)
