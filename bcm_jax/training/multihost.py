"""Multi-host utilities: initialization, CPU devices, consensus, preemption.

All communication uses JAX's distributed runtime, which discovers and monitors
the other processes.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
import pathlib
import shutil
import signal
import socket
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax import errors
from bcm_jax.utils import thread_pool

# Folder of the work directory in which each waiting process writes a file.
ARRIVALS = "arrivals"


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_secs: int = 100,
    workdir: str | None = None,
    patience_secs: int = 300,
) -> None:
  """Joins the other processes of the run; call before any computation.

  On Cloud TPU pods, GKE, SLURM and Open MPI, JAX detects the cluster; elsewhere
  pass coordinator, num_processes and process_id, or omit all three for a run of
  one process.

  Args:
    coordinator: host:port of process 0, the same for all processes.
    num_processes: number of processes.
    process_id: index of this process, 0 .. num_processes - 1.
    heartbeat_secs: seconds without a heartbeat after which a process counts as
      dead and the runtime ends the others.
    workdir: work directory, for `log_missing_hosts`.
    patience_secs: timeout of joining in seconds.

  Raises:
    UserError: only some of the three arguments are set, process_id is out of
      range, or coordinator is not HOST:PORT.
  """
  cluster = (coordinator, num_processes, process_id)
  if None in cluster and any(x is not None for x in cluster):
    raise errors.UserError(
        "--coordinator, --num_processes and --process_id: got "
        f"{coordinator}, {num_processes} and {process_id}, expected all three "
        "or None for all; set the missing ones"
    )
  if jax.distributed.is_initialized():
    return
  if num_processes is not None and not 0 <= process_id < num_processes:
    raise errors.UserError(
        f"--process_id: got {process_id}, expected 0 .. {num_processes - 1} "
        f"for --num_processes={num_processes}; number the processes from 0"
    )
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
      raise errors.UserError(
          f"--coordinator: got {coordinator!r}, expected HOST:PORT of process 0"
      )
  try:
    with log_missing_hosts(
        workdir, process_id, num_processes, min(20.0, patience_secs / 6)
    ):
      jax.distributed.initialize(
          *cluster, initialization_timeout=patience_secs,
          heartbeat_timeout_seconds=heartbeat_secs,
          cluster_detection_method=(
              None if coordinator is None else "deactivate"
          ),
      )
  except ValueError:
    if coordinator is not None:
      raise
    # JAX detects no cluster: a run of one process.
  except RuntimeError as e:
    # In a notebook devices are already in use. A failed connection raises a
    # subclass of RuntimeError.
    if type(e) is not RuntimeError or coordinator is not None:
      raise


@contextlib.contextmanager
def log_missing_hosts(
    workdir: str | None,
    number: int | None,
    count: int | None,
    every_secs: float = 20.0,
) -> Iterator[None]:
  """Logs which processes have not joined while this one waits in the context.

  JAX itself reports only a timeout. Each waiting process updates a file in the
  work directory; processes without a current file have not started.

  Args:
    workdir: work directory; None disables the log.
    number: index of this process; None identifies it by host and pid.
    count: number of processes; None if JAX detects it.
    every_secs: interval of the warnings in seconds.
  """
  if workdir is None:
    yield
    return
  joined = threading.Event()
  thread = threading.Thread(
      target=_log_missing, args=(joined, workdir, number, count, every_secs),
      name="arrivals", daemon=True,
  )
  thread.start()
  try:
    yield
  finally:
    joined.set()
    thread.join()


def _log_missing(joined, workdir, number, count, every_secs) -> None:
  folder = pathlib.Path(workdir) / ARRIVALS
  own = f"{socket.gethostname()}-{os.getpid()}" if number is None else number
  previous: dict[str, str] | None = None
  beats = 0
  while not joined.wait(every_secs):
    beats += 1
    with contextlib.suppress(OSError):
      folder.mkdir(parents=True, exist_ok=True)
      (folder / str(own)).write_text(f"{os.getpid()} {beats}")
      marks = {path.name: path.read_text() for path in folder.iterdir()}
      if previous is not None:
        # A file that does not change is from an earlier start.
        waiting = {name for name in marks if marks[name] != previous.get(name)}
        _warn({str(own), *waiting}, number, count, beats * every_secs)
      previous = marks
  if beats:  # All processes have joined.
    shutil.rmtree(folder, ignore_errors=True)


def _warn(waiting: set[str], number, count, seconds: float) -> None:
  who = "this process" if number is None else f"process {number} of {count}"
  missing = "" if count is None else ", ".join(
      str(i) for i in range(count) if str(i) not in waiting
  )
  logging.warning(
      "%s has waited %.0f s for the other processes; waiting: %s%s", who,
      seconds, ", ".join(sorted(waiting)),
      f"; not started: process {missing}" if missing else "",
  )


def use_cores(count: int, batch_size: int, processes: int = 1) -> None:
  """Sets the number of CPU devices of JAX.

  XLA hardly parallelizes small convolutions over threads, so one device per
  core uses the cores better than one device for all cores. Call before the
  first use of JAX; a number of devices in XLA_FLAGS overrides this one.

  Args:
    count: number of devices; 0 selects the largest divisor of the local batch
      up to the number of usable cores and 8.
    batch_size: size of the global batch.
    processes: number of processes that share the batch.
  """
  if not count:
    local_batch = max(batch_size // processes, 1)
    count = max(
        n for n in range(1, min(thread_pool.usable_cores(), 8) + 1)
        if local_batch % n == 0
    )
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in flags:
    jax.config.update("jax_num_cpu_devices", count)


def all_agree(ok: bool) -> bool:
  """Returns whether `ok` holds on all processes."""
  if jax.process_count() == 1:
    return bool(ok)
  return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def raise_everywhere(
    error: errors.UserError | errors.MachineError | None
) -> None:
  """Raises the error of process 0 on all processes; no process then waits for
  another one.

  Args:
    error: error of this process or None; only that of process 0 counts.

  Raises:
    UserError, MachineError: process 0 has an error.
  """
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  text = np.zeros(4096, np.uint8)
  if error is not None and jax.process_index() == 0:
    kind = b"M" if isinstance(error, errors.MachineError) else b"U"
    encoded = (kind + str(error).encode())[: text.size]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  message = multihost_utils.broadcast_one_to_all(text).tobytes().rstrip(b"\0")
  if message:
    cls = errors.MachineError if message[:1] == b"M" else errors.UserError
    raise cls(message[1:].decode(errors="replace"))


def to_host(tree: Any) -> Any:
  """Copies global arrays to NumPy arrays; every host gets the whole array.

  Args:
    tree: tree of jax.Array, sharded or replicated, or host arrays.

  Returns:
    The tree with C-ordered NumPy arrays.
  """

  def copy(x):
    if isinstance(x, jax.Array):
      if x.is_fully_replicated:
        x = x.addressable_data(0)
      elif not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    # np.asarray of a CPU array may share memory with a buffer donated later.
    return np.array(x, order="C")

  return jax.tree.map(copy, tree)


class PreemptionSignal:
  """Detects a preemption signal (SIGTERM) or Ctrl-C on any process of the run.

  With several processes, JAX's preemption service distributes the signal and
  selects a step that no process has passed. With one process, a signal handler
  sets a flag.

  Before a step of this start is finished and after the last save there is
  nothing to save: SIGTERM then ends a single process at once, also while it
  compiles. It raises nothing, since XLA crashes if an exception interrupts a
  compilation and the interpreter exits.

  Args:
    release: called before the process ends, for example to release a lock.
    end: ends the process with a status; replaced by tests.
  """

  def __init__(
      self,
      release: Callable[[], Any] = lambda: None,
      end: Callable[[int], Any] = os._exit,
  ):
    self._release = release
    self._end = end
    self._preempted = self._interrupted = False
    self._deferred = self._stepped = False

  def reached(self, call: int) -> bool:
    """Returns whether to save and stop after a call of the training step.

    Args:
      call: index of the call, 0, 1, 2, ...; query each index once.
    """
    self._stepped = True
    if jax.process_count() > 1:
      # JAX returns True for one index only, after which the loop may roll back.
      self._preempted |= multihost_utils.reached_preemption_sync_point(call)
    return self._preempted

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Handles SIGTERM and SIGINT in the context, in the main thread only.

    Raises:
      KeyboardInterrupt: SIGINT was received twice, or with nothing to save.
    """
    if threading.current_thread() != threading.main_thread():
      yield
      return
    handlers = {signal.SIGINT: self._interrupt}
    if jax.process_count() == 1:
      handlers[signal.SIGTERM] = self._preempt
    with contextlib.ExitStack() as stack:
      for number, handler in handlers.items():
        old_handler = signal.signal(number, handler)
        stack.callback(signal.signal, number, old_handler)
      yield

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Defers the end of the process from the first finished step on.

    The loop polls `reached`.

    Raises:
      Preempted: at the end of the context, if a signal was received in it.
    """
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False
    if self._preempted:
      raise errors.Preempted(_NOTHING_TO_SAVE)

  @property
  def _to_save(self) -> bool:
    return self._deferred and self._stepped

  def _preempt(self, number: int, frame: types.FrameType | None) -> None:
    del number, frame
    self._preempted = True
    if not self._to_save:
      _say(f"preempted: {_NOTHING_TO_SAVE}")
      self._release()
      self._end(errors.EXIT_PREEMPTED)

  def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
    if self._interrupted or not self._to_save:
      signal.default_int_handler(number, frame)
    self._interrupted = True
    _say("interrupted; saving after this step (again: stops without)")
    if jax.process_count() > 1:  # JAX informs the other processes.
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._preempted = True


_NOTHING_TO_SAVE = (
    "nothing to save; the same command resumes from the newest checkpoint"
)


def _say(text: str) -> None:
  """Writes a line to stderr; a handler may interrupt a print."""
  os.write(2, f"{text}\n".encode())
