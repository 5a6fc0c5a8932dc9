"""Checkpoints with digests, fallback and quarantine, on top of Orbax.

Orbax commits a step atomically, but it neither detects a flipped byte (the step
restores with wrong values) nor falls back to an older step if the newest cannot
be read. Here every leaf is saved with a SHA-256 digest, which is verified on
reading. A damaged step is moved to quarantine, never deleted, and the next
older step is read.

Only process 0 writes. It writes unsharded arrays: shards of other hosts are
gathered leaf by leaf, so that digests do not depend on the sharding. All
processes read the same step.

A step consists of two Orbax items: `state`, nested dicts of arrays, independent
of class names, and `meta`, JSON with the metadata of the caller and the
manifest of leaves. `None`, empty dicts and arrays without elements (which Orbax
does not support) are only in the manifest.

Only this module imports Orbax, which takes seconds.
"""

from collections.abc import Callable, Mapping
import dataclasses
import logging as std_logging
import pathlib
import re
import time
from typing import Any

from absl import logging
from etils import epath
from flax import serialization
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from bcm_jax import errors
from bcm_jax.checkpoint import digests
from bcm_jax.training import fault_injection
from bcm_jax.training import multihost
from bcm_jax.utils import hashing

_STATE, _META = "state", "meta"
# Environment failures: the checkpoint itself may be intact.
_NOT_DAMAGE = (MemoryError, PermissionError)
_MAX_LISTED = 5
# Name of the folder of a step; int() would also take digits of other scripts.
_STEP = re.compile(r"0|[1-9][0-9]*")


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A verified step on the host.

  Attributes:
    step: step number.
    leaves: path -> host array, None or {}.
    meta: metadata of the caller.
  """

  step: int
  leaves: dict[digests.Path, Any]
  meta: dict[str, Any]


class _QuietOrbax(std_logging.Filter):
  """Removes Orbax's log records below ERROR: dozens of lines per save."""

  def filter(self, record: std_logging.LogRecord) -> bool:
    path = record.pathname.replace("\\", "/")
    return record.levelno >= std_logging.ERROR or "/orbax/" not in path


std_logging.getLogger("absl").addFilter(_QuietOrbax())


class Checkpoints:
  """The checkpoints of one run, `<directory>/<step>/`.

  Reading does not modify the directory, except that `restore` moves damaged
  steps; a directory of another run can be opened safely.
  """

  def __init__(
      self,
      directory: str,
      keep: int | None = 3,
      keep_every: int | None = None,
  ):
    """Opens a directory; the first save creates it.

    Args:
      directory: folder of the steps, a local or gs:// path.
      keep: number of newest steps to keep; None keeps all.
      keep_every: steps divisible by this number are always kept.
    """
    self._directory = epath.Path(directory).expanduser()
    if "://" not in str(self._directory):
      # Orbax accepts absolute paths only.
      self._directory = self._directory.resolve()
    self._keep = keep
    self._keep_every = keep_every
    self._manager = None

  @property
  def directory(self) -> str:
    """Absolute path of the folder with the steps."""
    return str(self._directory)

  def save(
      self, step: int, state: Any, meta: dict[str, Any], force: bool = False
  ) -> bool:
    """Saves a state and its metadata as one atomic step, in the background.

    The arrays are copied to the host before this returns; the caller may donate
    or overwrite them. Errors of the background write are raised by the next
    `save`, `wait` or `close`.

    Args:
      step: non-negative step number.
      state: a pytree of containers that Flax can serialize (dicts, lists,
        named tuples, flax.struct dataclasses) with array leaves.
      meta: JSON values: config, code version, data position, ...
      force: whether to replace an existing step. The old one is deleted first;
        a kill before the commit loses this step, but not older ones.

    Returns:
      False if the step exists and force is False.

    Raises:
      TypeError: a leaf is not an array of numbers, or meta is not JSON.
      UserError: the directory is not writable.
    """
    step = int(step)
    leaves = {path: digests.to_host(path, leaf)
              for path, leaf in digests.flatten(state).items()}
    if jax.process_index() != 0:
      return True
    record = digests.make_record(step, leaves, meta)
    manager = self._writer()
    if step in self.all_steps():
      if not force:
        return False
      manager.delete(step)
    # Leaves without elements are only in the manifest.
    arrays = {p: x for p, x in leaves.items() if getattr(x, "size", 0)}
    # With force Orbax also saves a step older than the newest one.
    return bool(manager.save(step, force=True, args=ocp.args.Composite(**{
        _STATE: ocp.args.StandardSave(traverse_util.unflatten_dict(arrays)),
        _META: ocp.args.JsonSave(record),
    })))

  def all_steps(self) -> list[int]:
    """Returns committed steps in ascending order; waits for a pending save."""
    self.wait()
    if not self._directory.exists():
      return []
    # On local disks, an uncommitted step has a suffix in its name. Object
    # stores cannot rename; there a committed step has a marker file.
    marker = "://" in str(self._directory)
    return sorted(
        int(path.name)
        for path in self._directory.iterdir()
        if _STEP.fullmatch(path.name) and path.is_dir()
        and (not marker or (path / "commit_success.txt").exists())
    )

  def restore(
      self,
      template: Any,
      step: int | None = None,
      check: Callable[[dict[str, Any]], None] = lambda meta: None,
  ) -> tuple[int, Any, dict[str, Any]]:
    """Restores the newest good step, or a given step.

    A damaged step is logged as one error line. If an older step is good, the
    damaged one is moved to `<directory>/../damaged/<step>-<n>`. If all steps
    are damaged they stay in place, so that a restarted job fails again instead
    of silently starting from scratch.

    Args:
      template: pytree of arrays or jax.ShapeDtypeStruct: structure, shapes,
        dtypes and shardings of the result. NumPy leaves stay on the host.
      step: the step to restore; None is the newest good one.
      check: raises UserError if the metadata is not that of this run; called
        before anything is moved.

    Returns:
      (step, state like template, meta).

    Raises:
      UserError: no checkpoint, no good checkpoint, no checkpoint of this step,
        or one that does not fit the template.
    """
    loaded, damaged = self._load(step)
    check(loaded.meta)
    expected = digests.flatten(template)
    self._check_fits(expected, loaded)
    for bad, reason in damaged:
      self.set_aside(bad, f"damaged: {reason}", loaded.step)
    leaves = {path: digests.place(leaf, loaded.leaves[path])
              for path, leaf in expected.items()}
    state = serialization.from_state_dict(
        template, traverse_util.unflatten_dict(leaves)
    )
    return loaded.step, state, loaded.meta

  def read_raw(
    self, step: int | None = None
  ) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Reads a step without a template; never moves a damaged step.

    Args:
      step: the step to read; None is the newest good one.

    Returns:
      (step, nested dicts of NumPy arrays, meta); lists and tuples are dicts
      with keys '0', '1', ..., as in flax.serialization.

    Raises:
      UserError: no checkpoint, no good checkpoint, or no checkpoint of this
        step.
    """
    loaded, damaged = self._load(step)
    for bad, reason in damaged:
      logging.error(
        "checkpoint step %d in %s is damaged (%s); using step %d",
        bad,
        self.directory,
        reason,
        loaded.step,
      )
    return loaded.step, traverse_util.unflatten_dict(loaded.leaves), loaded.meta

  def wait(self) -> None:
    """Blocks until a pending save is committed; raises its error, if any."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for a pending save and ends Orbax's threads; `save` restarts them.
    """
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _writer(self) -> ocp.CheckpointManager:
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        keep_period=self._keep_every,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=_single_process("write"),
      )
      try:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
      except OSError as e:
        raise errors.UserError(
          f"--workdir: got {self.directory}, which cannot be written "
          f"({_one_line(e)}), expected a writable folder; choose another one "
          "or change its permissions"
        ) from e
    return self._manager

  def _load(self, step: int | None) -> tuple[Loaded, list[tuple[int, str]]]:
    """Returns (newest good step, newer damaged steps with the reasons)."""
    steps = self.common_steps()
    if not steps:
      raise errors.UserError(
        f"{self.directory}: got no checkpoint, expected at least one saved "
        "step; train first or pass the folder of another run"
      )
    if step is not None and step not in steps:
      raise errors.UserError(
        f"{self.directory}: got step {step}, expected one of the saved steps "
        f"{_listed(steps)}; choose one of these"
      )
    damaged = []
    for candidate in [step] if step is not None else reversed(steps):
      reason = loaded = None
      try:
        loaded = read_step(self._directory / str(candidate))
      except digests.Damage as e:
        reason = str(e)
      if multihost.all_agree(loaded is not None):
        return loaded, damaged
      damaged.append((candidate, reason or "damage reported by another host"))
    raise self._none_good(damaged, step)

  def common_steps(self) -> list[int]:
    """Returns `all_steps()` of process 0 on all processes."""
    steps = self.all_steps()
    if jax.process_count() == 1:
      return steps
    count = multihost_utils.broadcast_one_to_all(np.int32(len(steps)))
    padded = np.full(int(count), -1, np.int64)
    padded[: min(len(steps), len(padded))] = steps[: len(padded)]
    return [int(s) for s in multihost_utils.broadcast_one_to_all(padded)]

  def _check_fits(
    self, expected: dict[digests.Path, Any], loaded: Loaded
  ) -> None:
    wrong = digests.differences(expected, loaded.leaves)
    if wrong:
      more = len(wrong) - _MAX_LISTED
      listed = ", ".join(wrong[:_MAX_LISTED])
      raise errors.UserError(
        f"{self.directory}: got a checkpoint of step {loaded.step} with other "
        f"leaves ({listed}{f' and {more} more' if more > 0 else ''}), expected "
        "those of this config; use the config of the run or another --workdir"
      )

  def _none_good(self, damaged, step: int | None) -> errors.UserError:
    for bad, reason in damaged:
      logging.error(
        "checkpoint step %d in %s is damaged (%s); left in place",
        bad,
        self.directory,
        reason,
      )
    tried = "; ".join(f"step {bad}: {why}" for bad, why in damaged)
    if step is not None:
      others = [s for s in self.all_steps() if s != step]
      fix = (
        f"choose another step ({_listed(others)})"
        if others
        else "restore it from a backup, since no other step exists"
      )
    else:
      fix = (
        "restore one from a backup, or move the folder away to start from "
        "scratch"
      )
    return errors.UserError(
      f"{self.directory}: got damaged checkpoints ({tried}), expected one "
      f"with matching digests; {fix}"
    )

  def set_aside(
    self, step: int, reason: str, instead: int | None = None
  ) -> None:
    """Moves a step to the quarantine folder `<directory>/../damaged/`.

    Args:
      step: the step to move.
      reason: for the log.
      instead: step that is used in its place, for the log.
    """
    quarantine = self._directory.parent / "damaged"
    number = 0
    while (quarantine / f"{step}-{number}").exists():
      number += 1
    target = quarantine / f"{step}-{number}"
    if jax.process_index() == 0:
      quarantine.mkdir(parents=True, exist_ok=True)
      (self._directory / str(step)).rename(target)
      fallback = "" if instead is None else f"; falling back to step {instead}"
      logging.error(
        "checkpoint step %d is set aside (%s): moved to %s%s",
        step,
        reason,
        target,
        fallback,
      )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    if self._manager is not None:
      self._manager.reload()


@dataclasses.dataclass
class CheckpointSaver:
  """Saves checkpoints; tolerates a bounded number of consecutive failures.

  Attributes:
    saved: the checkpoints.
    meta: metadata of every checkpoint, JSON values.
    max_failures: number of consecutive failures that stops the run.
    wait_secs: seconds between retries of the last save.
    sleep: waits for a number of seconds.
    failures: number of consecutive failures.
    newest: newest committed step, None without one.
    known: committed steps in ascending order.
  """

  saved: Checkpoints
  meta: Mapping[str, Any]
  max_failures: int = 3
  wait_secs: float = 10.0
  sleep: Callable[[float], Any] = time.sleep
  failures: int = 0
  newest: int | None = None
  known: list[int] = dataclasses.field(default_factory=list)

  def save(self, step: int, state: Any) -> None:
    """Saves in the background; the next save detects a failure.

    Args:
      step: step number.
      state: see `Checkpoints.save`.

    Raises:
      MachineError: too many consecutive failures.
    """
    fault_injection.point("before_save")
    self._settle()
    self._attempt(lambda: self._begin(step, state))

  def steps(self) -> list[int]:
    """Returns the committed steps in ascending order, equal on all hosts."""
    self._settle()
    return self.known

  def finish(self, step: int, state: Any) -> None:
    """Saves at the end of a run; retries until the step is committed.

    Args:
      step: step number.
      state: see `Checkpoints.save`.

    Raises:
      MachineError: too many consecutive failures.
    """
    self._settle()
    while step not in self.known:
      started = self._attempt(lambda: self._begin(step, state))
      if not (self._settle() and started):
        self.sleep(self.wait_secs)

  def _begin(self, step: int, state: Any) -> None:
    self.saved.save(step, state, dict(self.meta))
    fault_injection.point("mid_write")

  def _settle(self) -> bool:
    """Waits for a pending save, then updates `known` and `newest`.

    A new step resets `failures`. Only process 0 observes the commit of a step;
    it broadcasts the steps after waiting.
    """
    if not self._attempt(self.saved.wait):
      return False
    self.known, previous = self.saved.common_steps(), self.newest
    self.newest = max(self.known, default=None)
    if self.known and (previous is None or self.newest > previous):
      fault_injection.point("after_commit")
      self.failures = 0
    return True

  def _attempt(self, action: Callable[[], Any]) -> bool:
    """Returns whether an action succeeded on all hosts; counts failures."""
    problem = None
    try:
      action()
    except TypeError:  # A bug in the state, not a failure of the disk.
      raise
    except Exception as e:  # Orbax raises bare Exceptions.
      problem = e
    if multihost.all_agree(problem is None):
      return True
    self.failures += 1
    text = " ".join(str(problem or "on another host").split())
    if len(text) > 300:  # The cause is at the end, after long paths.
      text = f"{text[:60]} ... {text[-240:]}"
    logging.error(
      "a checkpoint could not be written to %s (%s); failure %d of %d",
      self.saved.directory,
      text,
      self.failures,
      self.max_failures,
    )
    if self.failures >= self.max_failures:
      raise errors.MachineError(
        f"{self.saved.directory}: got {self.failures} consecutive failures to "
        f"write a checkpoint ({text}), expected fewer than "
        f"checkpoint.max_failures={self.max_failures}; free space or repair "
        f"the disk, then restart from step {self.newest}"
      ) from problem
    return False


def read_step(folder: epath.Path, version: int = digests.FORMAT) -> Loaded:
  """Reads one step, `<directory>/<step>`, into host memory.

  Args:
    folder: of the step, an absolute path.
    version: expected format.

  Raises:
    Damage: it does not verify.
    UserError: it has another format.
  """
  step = int(folder.name)
  if "://" not in str(folder):
    for path in pathlib.Path(folder).rglob("*"):
      if not path.is_file() and not path.is_dir():  # Orbax waits for a pipe.
        raise digests.Damage(f"{path.name}: a pipe or a dangling link")
  record = _attempt(
    "meta",
    lambda: _read_item(
      folder / _META, ocp.JsonCheckpointHandler(), ocp.args.JsonRestore()
    ),
  )
  record = dict(record) if isinstance(record, dict) else {}
  digest = record.pop("sha256", None)
  if digest != hashing.json_digest(record):
    raise digests.Damage("meta: digest differs")
  if record["format"] < version:
    raise errors.outdated(folder)
  if record["format"] > version:
    raise errors.UserError(
      f"{folder}: got a checkpoint of format {record['format']}, expected "
      f"{version}; use the version of bcm_jax that wrote it"
    )
  if record["step"] != step:
    raise digests.Damage(f"meta: belongs to step {record['step']}")
  tree: dict[str, Any] = {}
  if any(
    e["kind"] == "array" and 0 not in e["shape"] for e in record["leaves"]
  ):
    tree = _attempt(
      "state",
      lambda: _read_item(
        folder / _STATE,
        ocp.StandardCheckpointHandler(),
        ocp.args.StandardRestore(),
      ),
    )
  leaves = {}
  for entry in record["leaves"]:
    path = tuple(entry["path"])
    leaves[path] = digests.verified(entry, tree, path)
  return Loaded(step, leaves, record["meta"])


def _read_item(folder: epath.Path, handler: Any, args: Any) -> Any:
  options = _single_process("read")
  with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
    return reader.restore(folder, args=args)


def _single_process(what: str) -> ocp.options.MultiprocessingOptions:
  # Without barriers, since other hosts would wait at one for a failed host.
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=index,
    active_processes={index},
    barrier_sync_key_prefix=f"{what}{index}",
  )


def _attempt(what: str, read: Callable[[], Any]) -> Any:
  try:
    return read()
  except _NOT_DAMAGE:
    raise
  except Exception as e:  # Orbax raises bare Exceptions for bad data.
    raise digests.Damage(f"{what}: {_one_line(e)}") from e


def _one_line(error: BaseException, limit: int = 160) -> str:
  text = " ".join(str(error).split()) or "no message"
  text = text if len(text) <= limit else text[:limit] + "..."
  return f"{type(error).__name__}: {text}"


def _listed(steps: list[int]) -> str:
  return ", ".join(map(str, steps))
