"""States that a run can continue from: a new one, a checkpoint, a rollback."""

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

  All decisions follow from the files in the work directory, so a kill at any
  moment changes none of them.

  Attributes:
    workdir: of the run.
    backend: places states on the devices.
    saver: checkpoints of the run.
    create: () -> the state before the first step, on the host.
    template: () -> a state of the same shapes; traced only.
    frozen: networks that are not trained; they are not in checkpoints.
    fixed: facts that a run may not change: 'data_fingerprint' and 'frozen',
      the digest of each frozen network.
    data_name: of the data set, for errors.
    frozen_keys: frozen network -> key of section method that names it.
    max_rollbacks: roll-backs without a new checkpoint after which a run stops.
  """

  workdir: str
  backend: sharding.Backend
  saver: checkpoint.CheckpointSaver
  create: Callable[[], train_state.TrainState]
  template: Callable[[], train_state.TrainState]
  frozen: Mapping[str, Any]
  fixed: Mapping[str, Any]
  data_name: str
  frozen_keys: Mapping[str, str]
  max_rollbacks: int

  def start(self) -> train_state.TrainState:
    """Returns the newest good checkpoint or a new state, on the devices.

    A state that was rolled back to before continues as it did then.
    """
    state = self._restore() if self.saver.steps() else self.create()
    before = nonfinite.rollback_to(
      nonfinite.rollback_history(self.workdir),
      int(state.step),
      int(state.data_offset),
    )
    return self._place(state, before and before.position)

  def exhausted(self) -> bool:
    """Returns whether max_rollbacks brought no new checkpoint."""
    return self._past_rollbacks()[0] >= self.max_rollbacks

  def roll_back(
    self, error: nonfinite.NotFinite, data_offset: int
  ) -> train_state.TrainState:
    """Returns a saved state that continues with the data after a failed step.

    Args:
      error: the failed step.
      data_offset: offset of its data, as in the state of that step.
    """
    fault_injection.point("before_rollback")
    stored = self.saver.steps()
    before, reached = self._past_rollbacks()
    # The newest checkpoint did not help once and may cause the failure itself;
    # the one before it may not.
    older = stored[-2] if before and len(stored) > 1 else None
    good = self._restore(older) if stored else self.create()
    position = error.step + data_offset
    nonfinite.add_rollback(
      self.workdir,
      nonfinite.Rollback(
        int(good.step), int(good.data_offset), position, reached, before + 1
      ),
    )
    if older is not None:
      self.saver.saved.set_aside(
        stored[-1], "the steps after it were not finite", older
      )
    logging.error(
      "%s; continuing from step %d with other data (roll-back %d of %d)",
      error,
      int(good.step),
      before + 1,
      self.max_rollbacks,
    )
    return self._place(good, position)

  def _past_rollbacks(self) -> tuple[int, int]:
    """Returns (roll-backs since the run got further, greatest saved step)."""
    return nonfinite.rollbacks_without_progress(
      nonfinite.rollback_history(self.workdir),
      max(self.saver.steps(), default=0),
    )

  def _place(self, state, position: int | None) -> train_state.TrainState:
    if position is not None:
      state = train_state.roll_back(state, position)
    return self.backend.place(state.replace(frozen=self.frozen))

  def _restore(self, step: int | None = None) -> train_state.TrainState:
    """Returns the newest good checkpoint, or the one of `step`."""
    at, state, meta = self.saver.saved.restore(
      self.backend.abstract(jax.eval_shape(self.template)), step
    )
    check_unchanged(meta, self.fixed, self.data_name, self.frozen_keys)
    logging.info("resuming at step %d", at)
    return state


def check_unchanged(
    meta: Mapping[str, Any],
    fixed: Mapping[str, Any],
    data_name: str,
    frozen_keys: Mapping[str, str],
) -> None:
  """Raises UserError if images or frozen weights differ from the run's own.

  Args:
    meta: facts of a checkpoint.
    fixed: the same facts now.
    data_name: of the data set.
    frozen_keys: frozen network -> key of section method that names it.
  """
  began, found = (m.get("data_fingerprint") for m in (meta, fixed))
  if began not in (None, found):
    raise errors.UserError(
      f"data.path: {data_name} has images of fingerprint {found}, expected "
      f"{began}, those the run in the work directory was trained on; correct "
      "data.path, or use another --workdir"
    )
  began, found = meta.get("frozen", {}), fixed["frozen"]
  for which in sorted(began.keys() | found.keys()):
    if began.get(which) != found.get(which):
      key = frozen_keys.get(which, which)
      raise errors.UserError(
        f"method.{key}: got weights of digest {found.get(which)}, expected "
        f"{began.get(which)}, those the run in the work directory began "
        f"with; correct method.{key}, or use another --workdir"
      )
