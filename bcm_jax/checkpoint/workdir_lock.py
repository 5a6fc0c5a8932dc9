"""Exclusive work-directory lock with a heartbeat.

Clocks of two machines are not compared: a second writer watches whether the
owner's count of beats rises. An owner that is known to be dead (same machine,
no such process) is not waited for.
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
# Beats that an owner may miss: a slow disk, a busy machine.
_PATIENCE = 3


def _start_of(pid: int) -> str | None:
  """Returns when a process started, in ticks since boot; None if dead."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # The name, field 2, may contain spaces; field 22 is the start.
  return stat.rpartition(")")[2].split()[19]


def _machine() -> str:
  """Identifies the boot and namespace in which process numbers are unique."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return f"{socket.gethostname()}/{uuid.uuid4()}"


class WorkdirLock:
  """The exclusive right to write in a folder.

  Raises:
    UserError: on acquiring, another job holds it.
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
    """Whether another job has taken over the folder while this one hung."""
    return self._lost

  def look(self) -> bool:
    """Reads the file; returns whether this job still holds the lock.

    It does not if the file is gone: a job that took over may have finished.
    """
    owner = self._read()
    if owner is None or owner and owner.get("token") != self._own["token"]:
      self._lost = True
    return not self._lost

  def acquire(self) -> "WorkdirLock":
    """Takes the lock; waits only if the owner may be dead."""
    owner = self._read()
    if owner is None:
      self._create()
    else:
      if not self._dead(owner):
        self._wait_for(owner)
      self._write()
    found = self._read()
    if found is None or found.get("token") != self._own["token"]:
      raise self._refusal(found or {})
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
      owner = self._read()
      if owner is not None and owner.get("token") == self._own["token"]:
        os.remove(self._path)

  def __enter__(self) -> "WorkdirLock":
    return self.acquire()

  def __exit__(self, *exc_info) -> None:
    self.release()

  def _read(self) -> dict[str, Any] | None:
    try:
      found = json.loads(pathlib.Path(self._path).read_text())
    except FileNotFoundError:
      return None
    except (OSError, ValueError):
      return {}  # Half written, on a file system without atomic renames.
    return found if isinstance(found, dict) else {}

  def _dead(self, owner: dict[str, Any]) -> bool:
    if owner.get("machine") != self._own["machine"]:
      return False
    started = _start_of(owner.get("pid", 0))
    return started is None or started != owner.get("started")

  def _wait_for(self, owner: dict[str, Any]) -> None:
    """Returns once the owner's count has not risen for long enough."""
    logging.warning(
        "%s: process %s on %s holds this work directory; waiting %.0f s for a "
        "sign of life", self._path, owner.get("pid"), owner.get("host"),
        _PATIENCE * self._beat_secs,
    )
    for _ in range(_PATIENCE * 4):
      self._sleep(self._beat_secs / 4)
      now = self._read()
      if now is None:
        return
      if now != owner and now:
        raise self._refusal(now)
    logging.warning("%s: no sign of life; taking it over", self._path)

  def _refusal(self, owner: dict[str, Any]) -> errors.UserError:
    folder = os.path.dirname(self._path)
    return errors.UserError(
        f"--workdir={folder} is being written by process "
        f"{owner.get('pid', '?')} on {owner.get('host', '?')}; one run has one "
        "writer: stop that job, or use another --workdir"
    )

  def _create(self) -> None:
    """Creates the file; of two concurrent writers one succeeds."""
    try:
      with open(self._path, "x", encoding="utf-8") as out:
        json.dump(self._own | {"beats": 0}, out)
    except FileExistsError as e:
      raise self._refusal(self._read() or {}) from e

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
        logging.warning("%s cannot be written: %s", self._path, e.strerror)
