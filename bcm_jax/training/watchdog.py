"""Ends a process that makes no progress, after saying where it hangs.

A collective that waits for a dead peer, a stuck disk or a deadlock cannot be
caught as an exception; whoever started the run starts it again.
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

# Where Python itself is stuck no thread of its can run; faulthandler's can.
_BACKSTOP = 1.5


class Watchdog:
  """Waits for signs of progress in a thread.

  Args:
    secs: silence after which the process ends; 0 never ends it.
    file: receives the stacks of all threads, as stderr does.
    clock, end: for tests.
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
    """Begins to watch."""
    self._last = self._clock()
    if self._secs:
      self._arm()
      self._thread = threading.Thread(
          target=self._watch, name="watchdog", daemon=True
      )
      self._thread.start()
    return self

  def progress(self, step: int) -> None:
    """A step went through."""
    self._step = step
    self._last = self._clock()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Does not count what is done inside, such as waiting between tries."""
    self._paused += 1
    try:
      yield
    finally:
      self._paused -= 1
      self._last = self._clock()

  def close(self) -> None:
    """Stops watching."""
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
        f"error: no step went through for {self._secs:.0f} s after step "
        f"{self._step} (training.watchdog_timeout_secs); the stacks of all "
        f"threads follow "
        f"and are in {self._file}; exit status {errors.EXIT_HANGING}",
        file=sys.stderr, flush=True,
    )
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    try:
      os.makedirs(os.path.dirname(self._file), exist_ok=True)
      with open(self._file, "w", encoding="utf-8") as out:
        faulthandler.dump_traceback(out, all_threads=True)
    except OSError as e:  # The disk may be what hangs or is full.
      print(f"error: {self._file}: {e.strerror}", file=sys.stderr)
