"""Exclusive work-directory lock: numbered claims with a heartbeat.

A claim is a file lock/NNNNNN.json that is only created if it does not exist;
the highest number owns the work directory. A claim that is released, or whose
owner is dead, is not changed: another job claims the next number, which only
one of several can create. Numbers never decrease, so an owner that was
considered dead finds a higher claim when it looks. The protocol needs listing
and create-if-absent only, as a folder and an object store provide them.

The owner increments a counter in its claim. Another job waits to see whether
the counter increases; clocks of two machines are not compared. It does not wait
if the owner is a dead process of the same machine.
"""

from collections.abc import Callable
import contextlib
import logging
import os
import pathlib
import re
import socket
import threading
import time
from typing import Any
import uuid

from bcm_jax import errors
from bcm_jax.utils import files

FOLDER = "lock"
# Lock of earlier versions. A process of such a version stops if it is removed.
LEGACY_FILE = "lock.json"
_CLAIM = re.compile(r"[0-9]{6,}\.json")
_BEAT_SECS = 15.0
# Heartbeats that a live owner may miss because of a slow disk or machine.
_PATIENCE = 3


def _start_of(pid: Any) -> str | None:
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
      folder: str | os.PathLike[str],
      beat_secs: float = _BEAT_SECS,
      sleep: Callable[[float], Any] = time.sleep,
  ):
    self._workdir = pathlib.Path(folder)
    self._folder = self._workdir / FOLDER
    self._beat_secs = beat_secs
    self._sleep = sleep
    pid = os.getpid()
    # Identifies this process; JSON values.
    self._me = {
        "token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid,
        "started": _start_of(pid), "machine": _machine(),
    }
    self._number = 0
    self._beats = 0
    self._lost = False
    self._stop = threading.Event()
    self._thread: threading.Thread | None = None

  @property
  def lost(self) -> bool:
    """True if another job has taken over the lock, after this one hung."""
    return self._lost

  def look(self) -> bool:
    """Looks for a higher claim; returns whether this job still owns the lock.

    A missing claim means that a user removed it.
    """
    try:
      number, record = self._newest()
    except OSError:  # A network disk that does not answer.
      return not self._lost
    self._lost |= number != self._number or bool(
        record and record.get("token") != self._me["token"]
    )
    return not self._lost

  def acquire(self) -> "WorkdirLock":
    """Acquires the lock; waits only if its owner may be dead.

    Returns:
      self.

    Raises:
      UserError: another job owns the lock.
      OSError: the claim cannot be written.
    """
    self._folder.mkdir(exist_ok=True)
    self._until_free(self._legacy)
    self._number = self._until_free(self._newest) + 1
    claim = self._claim(self._number)
    try:
      files.create(claim, self._content())
    except FileExistsError as e:
      raise self._owned_error(self._read(claim)) from e
    if not self.look():
      # Higher claims were made, and lower ones removed, since the last listing.
      _remove(claim)
      raise self._owned_error(self._newest()[1] or {})
    for path in self._claims():
      if int(path.stem) < self._number:
        _remove(path)
    _remove(self._workdir / LEGACY_FILE)
    self._thread = threading.Thread(
        target=self._beat, name="lock", daemon=True
    )
    self._thread.start()
    return self

  def release(self) -> None:
    """Releases the lock; a second call does nothing."""
    self._stop.set()
    if self._thread is not None:
      self._thread.join()
      self._thread = None
      if self.look():
        self._write(released=True)

  def __enter__(self) -> "WorkdirLock":
    return self.acquire()

  def __exit__(self, *exc_info) -> None:
    self.release()

  def _claim(self, number: int) -> pathlib.Path:
    return self._folder / f"{number:06d}.json"

  def _claims(self) -> list[pathlib.Path]:
    try:
      return [p for p in self._folder.iterdir() if _CLAIM.fullmatch(p.name)]
    except FileNotFoundError:
      return []

  def _newest(self) -> tuple[int, dict[str, Any] | None]:
    """Returns (highest number, its record), or (0, None) without a claim."""
    number = max((int(path.stem) for path in self._claims()), default=0)
    return number, self._read(self._claim(number)) if number else None

  def _legacy(self) -> tuple[int, dict[str, Any] | None]:
    """Returns (0, record of an earlier version's lock), or (0, None)."""
    path = self._workdir / LEGACY_FILE
    return 0, self._read(path) if os.path.lexists(path) else None

  def _read(self, path: pathlib.Path) -> dict[str, Any]:
    """Returns a record; {} if it is half written or removed meanwhile."""
    try:
      record = files.read_json(path)
    except (OSError, ValueError):
      return {}
    return record if isinstance(record, dict) else {}

  def _free(self, record: dict[str, Any] | None) -> bool:
    """Returns whether nobody owns a claim: released, or of a dead process."""
    if record is None or record.get("released"):
      return True
    if record.get("machine") != self._me["machine"]:
      return False
    started = _start_of(record.get("pid", 0))
    return started is None or started != record.get("started")

  def _until_free(
      self, find: Callable[[], tuple[int, dict[str, Any] | None]]
  ) -> int:
    """Waits until a claim is free or has missed _PATIENCE heartbeats.

    Args:
      find: returns (number, record) of the claim that counts.

    Returns:
      The number of the claim that is free; the next one may be claimed.

    Raises:
      UserError: its owner is alive.
    """
    number, record = find()
    if self._free(record):
      return number
    logging.warning(
        "%s: process %s on %s owns this work directory; waiting %.0f s for "
        "its heartbeat", self._workdir, record.get("pid"), record.get("host"),
        _PATIENCE * self._beat_secs,
    )
    for _ in range(_PATIENCE * 4):
      self._sleep(self._beat_secs / 4)
      old, (number, record) = (number, record), find()
      if self._free(record):
        return number
      if (number, record) != old and record:
        raise self._owned_error(record)
    logging.warning("%s: no heartbeat; taking over the lock", self._workdir)
    return number

  def _owned_error(self, record: dict[str, Any]) -> errors.UserError:
    return errors.UserError(
        f"--workdir: got {self._workdir}, which process "
        f"{record.get('pid', '?')} on {record.get('host', '?')} is writing, "
        "expected no other writer; stop that job or use another --workdir"
    )

  def _content(self, **more: Any) -> bytes:
    return files.to_json(self._me | {"beats": self._beats} | more)

  def _write(self, **more: Any) -> None:
    """Replaces the record of this job's claim."""
    try:
      files.write_bytes(self._claim(self._number), self._content(**more))
    except OSError as e:  # A full disk is reported by the checkpoint saver.
      logging.warning(
          "cannot write %s: %s", self._claim(self._number), e.strerror
      )

  def _beat(self) -> None:
    while not self._stop.wait(self._beat_secs):
      if not self.look():
        return
      self._beats += 1
      self._write()


def _remove(path: pathlib.Path) -> None:
  """Removes a file that no longer counts, if it can be removed."""
  with contextlib.suppress(OSError):
    path.unlink()
