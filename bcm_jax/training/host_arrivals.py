"""Names the processes that a run waits for: JAX only says that time is up.

Whoever waits for long leaves a file in a folder that all see, and touches it
again and again; a process without one is where to look.
"""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
import shutil
import socket
import threading

FOLDER = "arrivals"


@contextlib.contextmanager
def watched(
    workdir: str | None,
    number: int | None,
    count: int | None,
    every_secs: float = 20.0,
) -> Iterator[None]:
  """Inside, this process waits for the others; says for whom, if for long.

  Args:
    workdir: of the run; None says nothing.
    number: of this process; None is named by its host.
    count: processes of the run, None where only JAX knows.
    every_secs: until it is long, and between two warnings.
  """
  if workdir is None:
    yield
    return
  joined = threading.Event()
  thread = threading.Thread(
      target=_wait, args=(joined, workdir, number, count, every_secs),
      name="arrivals", daemon=True,
  )
  thread.start()
  try:
    yield
  finally:
    joined.set()
    thread.join()


def _wait(joined, workdir, number, count, every_secs) -> None:
  folder = pathlib.Path(workdir) / FOLDER
  mine = f"{socket.gethostname()}-{os.getpid()}" if number is None else number
  before: dict[str, str] | None = None
  beats = 0
  while not joined.wait(every_secs):
    beats += 1
    with contextlib.suppress(OSError):
      folder.mkdir(parents=True, exist_ok=True)
      (folder / str(mine)).write_text(f"{os.getpid()} {beats}")
      found = {path.name: path.read_text() for path in folder.iterdir()}
      if before is not None:
        # What does not change was left by an earlier start.
        here = {name for name in found if found[name] != before.get(name)}
        _warn({str(mine), *here}, number, count, beats * every_secs)
      before = found
  if beats:  # All have come.
    shutil.rmtree(folder, ignore_errors=True)


def _warn(here: set[str], number, count, seconds: float) -> None:
  who = "this process" if number is None else f"process {number} of {count}"
  missing = "" if count is None else ", ".join(
      str(i) for i in range(count) if str(i) not in here
  )
  logging.warning(
      "%s has waited %.0f s for all to join; waiting too: %s%s", who, seconds,
      ", ".join(sorted(here)),
      f"; not heard of: process {missing}" if missing else "",
  )
