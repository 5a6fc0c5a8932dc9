"""Exclusive work-directory lock with a heartbeat.

The holder of the lock increments a counter in its file. Another job that finds
the file waits to see whether the counter increases; clocks of two machines are
not compared. It does not wait if the holder is a dead process of the same
machine.
"""

from collections.abc import Callable
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any
import uuid

from bcm_jax import errors
from bcm_jax.utils import files

FILE = "lock.json"
_BEAT_SECS = 15.0
# Heartbeats that a live holder may miss because of a slow disk or machine.
_PATIENCE = 3


def _start_of(pid: int) -> str | None:
  """Returns the start of a process in ticks since boot; None if it is dead."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # Field 2, the name in parentheses, may contain spaces; field 22 is the start.
  return stat.rpartition(")")[2].split()[19]


def _machine() -> str:
  """Returns an identifier of the boot and PID namespace: PIDs are unique in it.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return f"{socket.gethostname()}/{uuid.uuid4()}"


class WorkdirLock:
  """Exclusive lock of a folder; a context manager.

  Args:
    folder: folder to lock, must exist.
    beat_secs: interval of the heartbeat in seconds.
    sleep: waits for a number of seconds; replaced by tests.
  """

  def __init__(
      self,
      folder: str,
      beat_secs: float = _BEAT_SECS,
      sleep: Callable[[float], Any] = time.sleep,
  ):
    self._path = os.path.join(folder, FILE)
    self._beat_secs = beat_secs
    self._sleep = sleep
    pid = os.getpid()
    self._own = {
        "token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid,
        "started": _start_of(pid), "machine": _machine(),
    }
    self._beats = 0
    self._lost = False
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None

  @property
  def lost(self) -> bool:
    """True if another job has taken over the lock, after this one hung."""
    return self._lost

  def look(self) -> bool:
    """Reads the file; returns whether this job still holds the lock.

    A missing file means that another job took over and has finished.
    """
    record = self._read()
    if record is None or record and record.get("token") != self._own["token"]:
      self._lost = True
    return not self._lost

  def acquire(self) -> "WorkdirLock":
    """Acquires the lock; waits only if its holder may be dead.

    Returns:
      self.

    Raises:
      UserError: another job holds the lock.
    """
    record = self._read()
    if record is None:
      self._create()
    else:
      if not self._dead(record):
        self._wait_for(record)
      self._write()
    record = self._read()
    if record is None or record.get("token") != self._own["token"]:
      raise self._held_error(record or {})
    self._thread = threading.Thread(
        target=self._beat, name="lock", daemon=True
    )
    self._thread.start()
    return self

  def release(self) -> None:
    """Removes the lock; a second call does nothing."""
    self._stop.set()
    if self._thread is not None:
      self._thread.join()
      self._thread = None
      record = self._read()
      if record is not None and record.get("token") == self._own["token"]:
        os.remove(self._path)

  def __enter__(self) -> "WorkdirLock":
    return self.acquire()

  def __exit__(self, *exc_info) -> None:
    self.release()

  def _read(self) -> dict[str, Any] | None:
    """Returns the record in the file; None without a file, {} if unreadable."""
    try:
      record = json.loads(pathlib.Path(self._path).read_text())
    except FileNotFoundError:
      return None
    except (OSError, ValueError):
      return {}  # Half written, on a file system without atomic renames.
    return record if isinstance(record, dict) else {}

  def _dead(self, holder: dict[str, Any]) -> bool:
    if holder.get("machine") != self._own["machine"]:
      return False
    started = _start_of(holder.get("pid", 0))
    return started is None or started != holder.get("started")

  def _wait_for(self, holder: dict[str, Any]) -> None:
    """Returns after the holder has missed _PATIENCE heartbeats.

    Raises:
      UserError: the holder is alive.
    """
    logging.warning(
        "%s: process %s on %s holds this work directory; waiting %.0f s for "
        "its heartbeat", self._path, holder.get("pid"), holder.get("host"),
        _PATIENCE * self._beat_secs,
    )
    for _ in range(_PATIENCE * 4):
      self._sleep(self._beat_secs / 4)
      record = self._read()
      if record is None:
        return
      if record != holder and record:
        raise self._held_error(record)
    logging.warning("%s: no heartbeat; taking over the lock", self._path)

  def _held_error(self, holder: dict[str, Any]) -> errors.UserError:
    folder = os.path.dirname(self._path)
    return errors.UserError(
        f"--workdir: got {folder}, which process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')} is writing, expected no other writer; stop "
        "that job or use another --workdir"
    )

  def _create(self) -> None:
    """Creates the file; of two concurrent jobs only one succeeds."""
    try:
      with open(self._path, "x", encoding="utf-8") as out:
        json.dump(self._own | {"beats": 0}, out)
    except FileExistsError as e:
      raise self._held_error(self._read() or {}) from e

  def _write(self) -> None:
    files.write_json(self._path, self._own | {"beats": self._beats})

  def _beat(self) -> None:
    while not self._stop.wait(self._beat_secs):
      if not self.look():
        return
      self._beats += 1
      try:
        self._write()
      except OSError as e:  # A full disk is reported by the checkpoint saver.
        logging.warning("cannot write %s: %s", self._path, e.strerror)
