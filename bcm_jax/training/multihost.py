"""Processes: joining them, sharing a host's cores, agreeing, being told to go.

JAX's distributed runtime finds and watches the other processes; nothing here
talks to them but through it.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from bcm_jax import errors
from bcm_jax.training import host_arrivals


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_secs: int = 100,
    workdir: str | None = None,
    patience_secs: int = 300,
) -> None:
  """Joins the other processes of the run; must come before any computation.

  On Cloud TPU pods, GKE, SLURM and Open MPI the arguments are found by JAX;
  elsewhere all three are given, or none for a run of one process.

  Args:
    coordinator: host:port of process 0, the same for all.
    num_processes: processes of the run.
    process_id: of this one, 0 .. num_processes - 1.
    heartbeat_secs: silence after which a process counts as dead, and the
      runtime ends the others.
    workdir: where those that wait for the others can name them.
    patience_secs: after which the runtime ends those that wait.

  Raises:
    UserError: some of the three arguments are missing.
  """
  given = (coordinator, num_processes, process_id)
  if None in given and any(x is not None for x in given):
    raise errors.UserError(
        "--coordinator, --num_processes and --process_id belong together; "
        f"got {coordinator}, {num_processes} and {process_id}"
    )
  if jax.distributed.is_initialized():
    return
  if num_processes is not None and not 0 <= process_id < num_processes:
    raise errors.UserError(
        f"--process_id={process_id} must lie in 0 .. {num_processes - 1}, "
        f"for --num_processes={num_processes}"
    )
  try:
    with host_arrivals.watched(workdir, process_id, num_processes,
                          min(20.0, patience_secs / 6)):
      jax.distributed.initialize(
          *given, initialization_timeout=patience_secs,
          heartbeat_timeout_seconds=heartbeat_secs,
          cluster_detection_method=(
              None if coordinator is None else "deactivate"
          ),
      )
  except ValueError:
    if coordinator is not None:
      raise
    # JAX sees no cluster: one process.
  except RuntimeError as e:
    # In a notebook devices are in use before this; failures to connect are of
    # a class below.
    if type(e) is not RuntimeError or coordinator is not None:
      raise


def use_cores(count: int, batch_size: int, processes: int = 1) -> None:
  """Makes JAX split the host into devices, where it runs on a CPU.

  XLA hardly splits small convolutions over threads, so devices of one core
  each keep more cores busy than one device of all. Must come before the first
  use of JAX; XLA_FLAGS that set a number of devices win.

  Args:
    count: devices; 0 takes one a usable core, at most 8, such that they
      divide the batch evenly.
    batch_size: examples of the global batch.
    processes: that share it.
  """
  if not count:
    if hasattr(os, "sched_getaffinity"):
      cores = len(os.sched_getaffinity(0))
    else:
      cores = os.cpu_count() or 1
    each = max(batch_size // processes, 1)
    count = max(n for n in range(1, min(cores, 8) + 1) if each % n == 0)
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in flags:
    jax.config.update("jax_num_cpu_devices", count)


def all_agree(ok: bool) -> bool:
  """Whether all processes say yes."""
  if jax.process_count() == 1:
    return bool(ok)
  return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def raise_everywhere(error: errors.UserError | None) -> None:
  """Raises process 0's error in all processes, so that none waits for it."""
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  text = np.zeros(4096, np.uint8)
  if error is not None and jax.process_index() == 0:
    encoded = str(error).encode()[: text.size]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  said = multihost_utils.broadcast_one_to_all(text).tobytes().rstrip(b"\0")
  if said:
    raise errors.UserError(said.decode(errors="replace"))


def to_host(tree: Any) -> Any:
  """Copies of global arrays as NumPy arrays; every host gets the whole."""

  def copy(x):
    if isinstance(x, jax.Array):
      if x.is_fully_replicated:
        x = x.addressable_data(0)
      elif not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    # np.asarray of a CPU array may share memory with a buffer donated later.
    return np.array(x, order="C")

  return jax.tree.map(copy, tree)


class Notice:
  """Whether the run was told to go: SIGTERM to any of its processes.

  With several processes JAX's preemption service spreads the notice and picks
  a call that none has passed; with one, a signal handler does.
  """

  def __init__(self):
    self._told = self._deferred = False

  def reached(self, call: int) -> bool:
    """Whether to save and go after a call; ask at every one, 0, 1, 2, ..."""
    if jax.process_count() > 1:
      # JAX says so for one call only, after which the loop may roll back.
      self._told |= multihost_utils.reached_preemption_sync_point(call)
    return self._told

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Takes SIGTERM for a notice: outside of `deferred` it raises Preempted."""
    alone = jax.process_count() == 1
    if not alone or threading.current_thread() != threading.main_thread():
      yield
      return
    before = signal.signal(signal.SIGTERM, self._tell)
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, before)

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Inside, a notice waits until the loop asks for it, or for the end."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False
    if self._told:
      self._go()

  def _tell(self, number: int, frame: types.FrameType | None) -> None:
    del number, frame
    self._told = True
    if not self._deferred:
      self._go()

  def _go(self) -> None:
    raise errors.Preempted(
        "nothing to save; the same command goes on with the newest checkpoint"
    )
