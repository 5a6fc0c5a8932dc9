"""Checkpoints with digests, fallback and quarantine, on top of Orbax.

Orbax commits a step atomically, but it neither detects a flipped byte (the step
restores with wrong values) nor tries an older step when the newest cannot be
read. Here every leaf is saved with a SHA-256 digest, which is verified on
reading; a step that fails is set aside, never deleted, and the next older one
is read.

Only process 0 writes, unsharded arrays: shards of other hosts are gathered leaf
by leaf, so that digests do not depend on the sharding. Every process reads, and
all read the same step.

A step holds two Orbax items: `state`, nested dicts of arrays that do not
depend on class names, and `meta`, JSON with the caller's facts and the
manifest of leaves. `None`, empty dicts and arrays without elements (which
Orbax refuses) are only in the manifest.

This is the only file that imports Orbax, which takes seconds.
"""

from collections.abc import Callable, Mapping
import dataclasses
import logging as std_logging
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
# Failures of the machine, not of the files: the checkpoint may be intact.
_NOT_DAMAGE = (MemoryError, PermissionError)
_MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """A verified step on the host: `leaves` maps paths to host values."""

  step: int
  leaves: dict[digests.Path, Any]
  meta: dict[str, Any]


class _QuietOrbax(std_logging.Filter):
  """Drops Orbax's records below ERROR: dozens of lines per save."""

  def filter(self, record: std_logging.LogRecord) -> bool:
    path = record.pathname.replace("\\", "/")
    return record.levelno >= std_logging.ERROR or "/orbax/" not in path


std_logging.getLogger("absl").addFilter(_QuietOrbax())


class Checkpoints:
  """The checkpoints of one run, `<directory>/<step>/`.

  Reading changes nothing, except that `restore` moves damaged steps, so a
  directory of another run can be opened safely.
  """

  def __init__(
      self,
      directory: str,
      keep: int | None = 3,
      keep_every: int | None = None,
  ):
    """Opens a directory; the first save creates it.

    Args:
      directory: of the steps, a local or gs:// path.
      keep: number of newest steps to keep; None keeps all.
      keep_every: steps divisible by this are always kept.
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
    """Absolute path of the folder of the steps."""
    return str(self._directory)

  def save(
      self, step: int, state: Any, meta: dict[str, Any], force: bool = False
  ) -> bool:
    """Saves a state and its facts as one atomic step, in the background.

    The arrays are copied to the host before this returns, so the caller may
    donate or overwrite them. Errors of the background write are raised by the
    next `save`, `wait` or `close`.

    Args:
      step: non-negative step number.
      state: a pytree of containers that Flax can serialise (dicts, lists,
        named tuples, flax.struct dataclasses) with array leaves.
      meta: JSON values: config, code version, data position, ...
      force: replace the step if it exists. The old one is deleted first: a kill
        in between costs this step, not older ones.

    Returns:
      False if the step exists and force is False.

    Raises:
      TypeError: a leaf is not an array of numbers, or meta is not JSON.
      UserError: the directory cannot be written.
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
    # The manifest has the other leaves.
    arrays = {p: x for p, x in leaves.items() if getattr(x, "size", 0)}
    # Orbax's own force means: also when a later step exists.
    return bool(manager.save(step, force=True, args=ocp.args.Composite(**{
        _STATE: ocp.args.StandardSave(traverse_util.unflatten_dict(arrays)),
        _META: ocp.args.JsonSave(record),
    })))

  def all_steps(self) -> list[int]:
    """Returns committed steps in rising order; waits for a save under way."""
    self.wait()
    if not self._directory.exists():
      return []
    # Leftovers of a killed save have a suffix on local disks. Object stores
    # cannot rename; a marker file there means committed.
    marker = "://" in str(self._directory)
    return sorted(
        int(path.name)
        for path in self._directory.iterdir()
        if path.name.isdigit()
        and (not marker or (path / "commit_success.txt").exists())
    )

  def restore(
      self, template: Any, step: int | None = None
  ) -> tuple[int, Any, dict[str, Any]]:
    """Restores the newest good step, or the one of `step`.

    A damaged step is logged as one error line and, once a good older one is
    found, moved to `<directory>/../damaged/<step>-<n>`. If none is good nothing
    is moved, so that a restarted job fails again instead of silently starting
    from scratch.

    Args:
      template: pytree of arrays or jax.ShapeDtypeStruct: structure, shapes,
        dtypes and shardings of the result. NumPy leaves stay on the host.
      step: restore only this step.

    Returns:
      (step, state like template, meta).

    Raises:
      UserError: no checkpoint, no good one, no such step, or an intact one that
        does not fit the template.
    """
    loaded, damaged = self._load(step)
    want = digests.flatten(template)
    self._check_fits(want, loaded)
    for bad, reason in damaged:
      self.set_aside(bad, f"damaged: {reason}", loaded.step)
    leaves = {path: digests.place(leaf, loaded.leaves[path])
              for path, leaf in want.items()}
    state = serialization.from_state_dict(
        template, traverse_util.unflatten_dict(leaves)
    )
    return loaded.step, state, loaded.meta

  def read_raw(
    self, step: int | None = None
  ) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Reads a step as `restore`, without a template; never moves a folder.

    Returns:
      (step, nested dicts of NumPy arrays, meta); lists and tuples are dicts
      with keys '0', '1', ..., as flax.serialization writes them.

    Raises:
      UserError: as `restore`.
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
    """Blocks until a save under way is committed; raises its error if any."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and frees Orbax's threads; a later save starts them again."""
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
        multiprocessing_options=_alone("write"),
      )
      try:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
      except OSError as e:
        raise errors.UserError(
          f"cannot write checkpoints to {self.directory}: {_one_line(e)}; "
          "expected a folder that this job may create and write; choose "
          "another workdir or change its permissions"
        ) from e
    return self._manager

  def _load(self, step: int | None) -> tuple[_Loaded, list[tuple[int, str]]]:
    """Returns the newest good step and the newer ones with their damage."""
    steps = self.common_steps()
    if not steps:
      raise errors.UserError(
        f"no checkpoint in {self.directory}; expected at least one saved "
        "step; train first or give the folder of another run"
      )
    if step is not None and step not in steps:
      raise errors.UserError(
        f"no checkpoint of step {step} in {self.directory}; expected one "
        f"of the saved steps {_listed(steps)}; choose one of these"
      )
    damaged = []
    for candidate in [step] if step is not None else reversed(steps):
      reason = loaded = None
      try:
        loaded = _read_step(self._directory / str(candidate), candidate)
      except digests.Damage as e:
        reason = str(e)
      if multihost.all_agree(loaded is not None):
        return loaded, damaged
      damaged.append((candidate, reason or "damaged as another host sees it"))
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

  def _check_fits(self, want: dict[digests.Path, Any], loaded: _Loaded) -> None:
    wrong = digests.differences(want, loaded.leaves)
    if wrong:
      more = len(wrong) - _MAX_LISTED
      listed = ", ".join(wrong[:_MAX_LISTED])
      raise errors.UserError(
        f"checkpoint step {loaded.step} in {self.directory} does not fit "
        f"this state: {listed}{f' and {more} more' if more > 0 else ''}; "
        "expected the same leaves; use the config the run was made with or "
        "another workdir"
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
      advice = (
        f"choose another step ({_listed(others)})"
        if others
        else "there is no other step; copy it back from a backup"
      )
    else:
      advice = (
        "copy a good one back from a backup, or move the folder away "
        "to start from scratch"
      )
    return errors.UserError(
      f"damaged checkpoints in {self.directory} ({tried}); expected one "
      f"whose digests agree; {advice}"
    )

  def set_aside(
    self, step: int, reason: str, instead: int | None = None
  ) -> None:
    """Moves a step to `<directory>/../damaged/`, which is never read."""
    home = self._directory.parent / "damaged"
    number = 0
    while (home / f"{step}-{number}").exists():
      number += 1
    target = home / f"{step}-{number}"
    if jax.process_index() == 0:
      home.mkdir(parents=True, exist_ok=True)
      (self._directory / str(step)).rename(target)
      then = "" if instead is None else f"; falling back to step {instead}"
      logging.error(
        "checkpoint step %d is set aside (%s): moved to %s%s",
        step,
        reason,
        target,
        then,
      )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    if self._manager is not None:
      self._manager.reload()


@dataclasses.dataclass
class CheckpointSaver:
  """Saves with a bounded number of retries: a full disk need not end a run.

  Attributes:
    saved: the checkpoints.
    meta: facts to keep with each.
    most: consecutive failures after which the run stops.
    wait_secs: between tries of a save that must succeed.
  """

  saved: Checkpoints
  meta: Mapping[str, Any]
  most: int = 3
  wait_secs: float = 10.0
  sleep: Callable[[float], Any] = time.sleep
  failures: int = 0
  newest: int | None = None
  known: list[int] = dataclasses.field(default_factory=list)

  def save(self, step: int, state: Any) -> None:
    """Saves in the background; failures are detected at the next save.

    Raises:
      MachineError: too many consecutive failures.
    """
    fault_injection.point("before_save")
    self._settle()
    self._attempt(lambda: self._begin(step, state))

  def steps(self) -> list[int]:
    """Returns the readable steps in rising order, the same on all hosts."""
    self._settle()
    return self.known

  def finish(self, step: int, state: Any) -> None:
    """Saves and waits until the step is committed, at the end of a run.

    Raises:
      MachineError: too many consecutive failures.
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
    """Waits for the save under way, then updates `known` and `newest`.

    A new step clears old failures. Only process 0 can see when a step is
    committed; it broadcasts the steps after it has waited.
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
    """Returns whether an action succeeded everywhere; counts failures."""
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
    if len(text) > 300:  # The cause is at the end, after paths.
      text = f"{text[:60]} ... {text[-240:]}"
    logging.error(
      "a checkpoint could not be written to %s (%s); failure %d of %d",
      self.saved.directory,
      text,
      self.failures,
      self.most,
    )
    if self.failures >= self.most:
      raise errors.MachineError(
        f"{self.failures} checkpoints in a row could not be written to "
        f"{self.saved.directory} ({text}); the newest is of step "
        f"{self.newest}. Free space or repair the disk, then start again"
      ) from problem
    return False


def _read_step(folder: epath.Path, step: int) -> _Loaded:
  """Reads one step into host memory; raises Damage if it does not verify."""
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
  if record["format"] != digests.FORMAT:
    raise errors.UserError(
      f"checkpoint {folder} has format {record['format']}; expected "
      f"{digests.FORMAT}; use the version of the library that wrote it"
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
  return _Loaded(step, leaves, record["meta"])


def _read_item(folder: epath.Path, handler: Any, args: Any) -> Any:
  alone = _alone("read")
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
    return reader.restore(folder, args=args)


def _alone(what: str) -> ocp.options.MultiprocessingOptions:
  # No barriers: a host that fails must not leave others waiting at one.
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
