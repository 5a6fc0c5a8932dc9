"""Start of a run from a checkpoint or a new state, and rollbacks."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from absl import logging
import jax

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.training import fault_injection
from bcm_jax.training import nonfinite
from bcm_jax.training import sharding
from bcm_jax.training import train_state


@dataclasses.dataclass
class Recovery:
  """Starts a run, and rolls it back after repeated non-finite steps.

  Every decision depends only on files in the work directory, so that it is the
  same after a kill and a restart.

  Attributes:
    workdir: work directory.
    backend: places states on the devices.
    saver: checkpoints of the run.
    create: () -> state before the first step, on the host.
    template: () -> state of the same shapes; only traced.
    frozen: parameters of networks that are not trained, by name; not saved in
      checkpoints.
    check_config: raises UserError if the metadata of a checkpoint has another
      config.
    fixed: metadata that a run may not change: 'data_fingerprint' and 'frozen',
      the digest of each frozen network.
    data_name: name of the data set, for errors.
    frozen_keys: frozen network -> its key in config section method.
    max_rollbacks: number of rollbacks without a new checkpoint that stops a
      run.
  """

  workdir: str
  backend: sharding.Backend
  saver: checkpoint.CheckpointSaver
  create: Callable[[], train_state.TrainState]
  template: Callable[[], train_state.TrainState]
  frozen: Mapping[str, Any]
  check_config: Callable[[Mapping[str, Any]], None]
  fixed: Mapping[str, Any]
  data_name: str
  frozen_keys: Mapping[str, str]
  max_rollbacks: int

  def start(self) -> train_state.TrainState:
    """Returns the newest good checkpoint or a new state, on the devices.

    After a rollback to this state, the data position of the rollback applies.
    """
    state = self._restore() if self.saver.steps() else self.create()
    rollback = nonfinite.rollback_to(
      nonfinite.rollback_history(self.workdir),
      int(state.step),
      int(state.data_offset),
    )
    return self._place(state, rollback and rollback.position)

  def exhausted(self, error: nonfinite.NotFinite) -> bool:
    """Returns whether max_rollbacks is reached without progress."""
    return self._past_rollbacks(error)[0] >= self.max_rollbacks

  def roll_back(
    self, error: nonfinite.NotFinite, data_offset: int
  ) -> train_state.TrainState:
    """Returns a saved state that continues with the data after a failed step.

    Args:
      error: the failed step.
      data_offset: data_offset of the state of that step.
    """
    fault_injection.point("before_rollback")
    stored = self.saver.steps()
    count, reached = self._past_rollbacks(error)
    # After a rollback to the newest checkpoint failed, that checkpoint may be
    # the cause; use the one before it.
    older = stored[-2] if count and len(stored) > 1 else None
    good = self._restore(older) if stored else self.create()
    position = error.step + data_offset
    nonfinite.add_rollback(
      self.workdir,
      nonfinite.Rollback(
        int(good.step),
        int(good.data_offset),
        position,
        max(reached, *stored, 0),
        count + 1,
      ),
    )
    if older is not None:
      self.saver.saved.set_aside(
        stored[-1], "steps after it were not finite", older
      )
    logging.error(
      "%s; continuing from step %d with other data (rollback %d of %d)",
      error,
      int(good.step),
      count + 1,
      self.max_rollbacks,
    )
    return self._place(good, position)

  def _past_rollbacks(self, error: nonfinite.NotFinite) -> tuple[int, int]:
    """Returns (rollbacks since the last progress, greatest saved step).

    A checkpoint within the streak of skipped steps is no progress: it has the
    parameters of the step before the streak.
    """
    before = error.step - error.in_row
    return nonfinite.rollbacks_without_progress(
      nonfinite.rollback_history(self.workdir),
      max((s for s in self.saver.steps() if s <= before), default=0),
    )

  def _place(self, state, position: int | None) -> train_state.TrainState:
    if position is not None:
      state = train_state.roll_back(state, position)
    return self.backend.place(state.replace(frozen=self.frozen))

  def _restore(self, step: int | None = None) -> train_state.TrainState:
    """Returns the newest good checkpoint, or that of `step`."""
    def check(meta):
      self.check_config(meta)
      check_unchanged(meta, self.fixed, self.data_name, self.frozen_keys)

    restored_step, state, _ = self.saver.saved.restore(
      self.backend.abstract(jax.eval_shape(self.template)), step, check
    )
    logging.info("resuming at step %d", restored_step)
    return state


def check_unchanged(
    meta: Mapping[str, Any],
    fixed: Mapping[str, Any],
    data_name: str,
    frozen_keys: Mapping[str, str],
) -> None:
  """Checks that a run resumes with the same images and frozen weights.

  Args:
    meta: metadata of a checkpoint.
    fixed: the current 'data_fingerprint' and 'frozen'.
    data_name: name of the data set.
    frozen_keys: frozen network -> its key in config section method.

  Raises:
    UserError: images or weights differ from those of the checkpoint.
  """
  expected, fingerprint = (m.get("data_fingerprint") for m in (meta, fixed))
  if expected not in (None, fingerprint):
    raise errors.UserError(
      f"data.path: got images of fingerprint {fingerprint} ({data_name}), "
      f"expected {expected}, as in the checkpoint; correct data.path or use "
      "another --workdir"
    )
  expected, digest = meta.get("frozen", {}), fixed["frozen"]
  for name in sorted(expected.keys() | digest.keys()):
    if expected.get(name) != digest.get(name):
      key = frozen_keys.get(name, name)
      raise errors.UserError(
        f"method.{key}: got weights of digest {digest.get(name)}, expected "
        f"{expected.get(name)}, as in the checkpoint; correct method.{key} or "
        "use another --workdir"
      )
