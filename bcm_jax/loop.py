"""The one training loop: from the newest checkpoint to the last step.

It knows no method. What may go wrong on the way is decided here and told in
docs/reliability.md: damaged checkpoints, steps that are not finite, notices to
go, another writer, hanging.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from typing import Any

from absl import logging
import jax

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import digests
from bcm_jax.checkpoint import runs
from bcm_jax.checkpoint import saver
from bcm_jax.checkpoint import workdir_lock
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.data import pipeline
from bcm_jax.training import fault_injection
from bcm_jax.training import goodput
from bcm_jax.training import hooks
from bcm_jax.training import metric_logger
from bcm_jax.training import multihost
from bcm_jax.training import nonfinite
from bcm_jax.training import rollbacks
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from bcm_jax.training import watchdog
from bcm_jax.utils import provenance


@dataclasses.dataclass
class Run:
  """A run from its newest checkpoint to its last step.

  Attributes:
    experiment: what is trained.
    workdir: of the run.
    source: training images.
    accounts: where the time goes.
    notice: whether the run was told to go.
    owner: the lock of the work directory; None on all hosts but one.
  """

  experiment: build.Experiment
  workdir: str
  source: image_source.Source
  accounts: goodput.Goodput
  notice: multihost.Notice
  owner: workdir_lock.Lock | None

  def __post_init__(self):
    config = self.experiment.config
    self.training = self.experiment.training
    self.parallel = self.experiment.parallel
    self.backend = self.experiment.backend()
    step = train_step.make_step(
        self.experiment.method, self.experiment.optimizers(),
        self.experiment.step_options(self.backend),
    )
    self.step_fns = {
        several: self.backend.compile(step, several)
        for several in (False, True)
    }
    self.compiled: set[Any] = set()
    self.calls = itertools.count()
    settings = self.experiment.checkpoint
    self.frozen = runs.load_frozen(self.experiment)
    # What a checkpoint does not hold, and a run may not change.
    self.fixed = {
        "data_fingerprint": image_source.fingerprint(self.source),
        "frozen": {k: digests.tree_digest(v) for k, v in self.frozen.items()},
    }
    self.saver = saver.Saver(
        checkpoint.Checkpoints(
            runs.checkpoint_dir(self.workdir), settings.keep,
            settings.keep_every,
        ),
        {"config": resolve.to_json(config), "version": __version__,
         **self.fixed},
        settings.max_failures, settings.retry_secs,
    )

  def train(self) -> train_state.TrainState:
    """The state after the last step."""
    total = self.training.num_steps
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.saver.saved)
      self.dog = watchdog.Watchdog(
          self.training.hang_secs,
          os.path.join(self.workdir, nonfinite.FOLDER,
                       f"stacks-host{jax.process_index()}.txt"),
      )
      self.saver.sleep = self._sleep
      with self.accounts.part("init"):
        state = self._start()
      self.accounts.begin(int(self.backend.fetch(state.step)))
      if int(self.backend.fetch(state.step)) >= total:
        return self.backend.fetch(state.saved())
      stack.enter_context(self.notice.deferred())
      stack.callback(self.dog.start().close)
      while True:
        try:
          return self._until_end(state)
        except nonfinite.NotFinite as e:
          # Its frames hold a state, whose place the next one needs.
          error = e.with_traceback(None)
        with self.accounts.part("rollback"):
          state = self._roll_back(error)

  def _sleep(self, seconds: float) -> None:
    with self.dog.paused():
      time.sleep(seconds)

  def _create(self, start_from: Any) -> train_state.TrainState:
    return build.create_state(self.experiment, start_from)

  def _start(self) -> train_state.TrainState:
    """The newest good checkpoint, or a new state, on the devices.

    Where it was rolled back to before, it goes on as it did then.
    """
    state = self._restore() if self.saver.steps() else self._new()
    before = rollbacks.of_state(
        rollbacks.history(self.workdir), int(state.step), int(state.window)
    )
    if before is not None:
      state = train_state.roll_back(state, before.position)
    return self.backend.place(state.replace(frozen=self.frozen))

  def _new(self) -> train_state.TrainState:
    """The state before the first step."""
    method, init_from = self.experiment.method, self.training.init_from
    start_from = {
        name: self.frozen[player.starts_from]
        for name, player in method.players.items() if player.starts_from
    }
    if init_from is not None:
      start_from[method.sampled] = runs.load_params(
          init_from, self.training.init_average
      )
    try:
      return self.backend.fetch(
          self.backend.create(self._create, start_from)
      )
    except ValueError as e:
      if not start_from or isinstance(e, errors.UserError):
        raise
      source = f"training.init_from={init_from}"
      if init_from is None:
        source = f"method.teacher={self.experiment.config.method.teacher}"
      raise errors.UserError(
          f"{source}: {e}; its network must be this one, but for the second "
          "time branch"
      ) from e

  def _restore(self, step: int | None = None) -> train_state.TrainState:
    """The newest good checkpoint, or that of a step."""
    template = jax.eval_shape(lambda: self._create(None))
    at, state, meta = self.saver.saved.restore(
        self.backend.abstract(template), step
    )
    _check_unchanged(meta, self.fixed, self.source.name)
    logging.info("resuming at step %d", at)
    return state

  def _until_end(self, state: train_state.TrainState) -> train_state.TrainState:
    """Runs the steps after state.step; saves, reports, and listens.

    Raises:
      NotFinite: too many steps in a row.
      Preempted: when the notice came.
    """
    method, total = self.experiment.method, self.training.num_steps
    every = self.experiment.config.checkpoint.every_steps
    first, window = (
        int(self.backend.fetch(x)) for x in (state.step, state.window)
    )
    calls = sharding.calls(
        method, first, total, self.parallel.steps_per_call, (every,)
    )
    judge = nonfinite.Guard(self.training.max_skipped_in_row)
    self.window = window
    self.accounts.begin(first)
    with contextlib.ExitStack() as stack:
      player = state.players[method.sampled]
      watch = metric_logger.open_watch(
          self.experiment, self.workdir, first,
          self.backend.fetch(player.params), stack,
      )
      began = time.monotonic()
      inputs_of = stack.enter_context(
          stream(self.experiment, self.source, self.backend, calls, window)
      )
      for start, count in calls:
        with self.accounts.part("data"):
          inputs = next(inputs_of)
        end = start + count
        state, metrics = self._call(state, inputs, start, count)
        self.latest = state
        watch(end, count, metrics)
        going = self.notice.reached(next(self.calls))
        last = going or end == total
        saving = last or end % every == 0
        # What is saved was judged before: a restart knows of no other steps.
        judge.check(end, metrics, wait=saving)
        self.dog.progress(end)
        self.accounts.progress(end)
        self._check_owner(saving)
        if saving:
          with self.accounts.part("checkpoint"), watch.report.timed("save"):
            watch.writer.flush()
            self._save(end, state, last)
        if going:
          raise errors.Preempted(
              f"step {end} of {total} is saved in {self.workdir}; the same "
              "command goes on"
          )
      seconds = hooks.format_secs(time.monotonic() - began)
      watch.progress.note(f"trained {total - first} steps in {seconds}")
    return self.backend.fetch(state.saved())

  def _call(self, state, inputs, start: int, count: int):
    """One call of the step; the first of a kind compiles."""
    phase = self.experiment.method.phase(start)
    kind = phase, count
    part = contextlib.nullcontext()
    if kind not in self.compiled:
      self.compiled.add(kind)
      part = self.accounts.part("compile")
    try:
      with part, jax.profiler.StepTraceAnnotation("train", step_num=start + 1):
        state, metrics = self.step_fns[count > 1](state, *inputs, phase)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      raise errors.UserError(
          f"step {start + 1} does not fit the devices' memory "
          f"({' '.join(str(e).split())[:160]}); lower parallel.max_examples "
          f"(it is {self.parallel.max_examples}), set model.remat=True, or cut "
          "the state by parallel.fsdp=0 and parallel.sharding=fsdp"
      ) from e
    return state, self.backend.fetch(metrics)

  def _save(self, step: int, state: train_state.TrainState, last: bool) -> None:
    """Saves what one copy of the state holds."""
    save = self.saver.finish if last else self.saver.save
    save(step, self.backend.fetch(state.saved()))
    self.dog.progress(step)
    self.accounts.save(step, self.saver.newest)

  def _check_owner(self, saving: bool) -> None:
    if self.owner is None:
      return
    if self.owner.lost or (saving and not self.owner.look()):
      raise errors.UserError(
          f"another job has taken over --workdir={self.workdir} while this one "
          "gave no sign of life; this one stops"
      )

  def _roll_back(self, error: nonfinite.NotFinite) -> train_state.TrainState:
    """A saved state, going on with the data after the step that failed.

    All depends on what is on disk alone, and no kill changes it.

    Raises:
      UserError: it was tried too often; a bundle is left.
    """
    fault_injection.point("before_rollback")
    stored, most = self.saver.steps(), self.training.max_rollbacks
    before, reached = rollbacks.in_row(
        rollbacks.history(self.workdir), stored[-1] if stored else 0
    )
    if before >= most:
      raise self._give_up(error)
    self.latest = older = None
    if before and len(stored) > 1:
      # The newest did not help and may hold the seed; the one before may not.
      older = stored[-2]
    good = self._restore(older) if stored else self._new()
    position = error.step + self.window
    rollbacks.add(self.workdir, rollbacks.Rollback(
        int(good.step), int(good.window), position, reached, before + 1
    ))
    if older is not None:
      self.saver.saved.set_aside(
          stored[-1], "the steps after it were not finite", older
      )
    logging.error(
        "%s; going on from step %d with other data (roll-back %d of %d)",
        error, int(good.step), before + 1, most,
    )
    again = train_state.roll_back(good, position)
    return self.backend.place(again.replace(frozen=self.frozen))

  def _give_up(self, error: nonfinite.NotFinite) -> errors.UserError:
    read = batches(self.experiment, self.source)
    batch = read(self.window + error.step - 1)
    state = multihost.to_host(self.backend.fetch(self.latest.saved()))
    folder = "that of process 0"
    if jax.process_index() == 0:
      facts = {
          "position": self.window + error.step - 1,
          "rollbacks": self.training.max_rollbacks,
          "facts": provenance.facts(self.experiment),
      }
      try:
        folder = nonfinite.write_bundle(
            self.workdir, error, state, batch, facts
        )
      except OSError as e:
        folder = f"no file ({e.strerror})"
    return errors.UserError(
      f"{error}; {self.training.max_rollbacks} roll-backs did not help. The "
      f"metrics, tensors and images of that step are in {folder}. Lower "
      "optimizer.learning_rate, set optimizer.grad_clip, or look for bad "
      "images"
    )


def batches(
  experiment: build.Experiment, source: image_source.Source
) -> pipeline.Batches:
  """This host's part of the batch at a position."""
  config = experiment.config
  return pipeline.Batches(
    source,
    config.seed,
    config.training.batch_size,
    flip=config.data.flip,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def stream(
  experiment: build.Experiment,
  source: image_source.Source,
  backend: sharding.Backend,
  calls: list[tuple[int, int]],
  window: int,
):
  """Batches and curricula of calls, made and put on the devices ahead.

  Args:
    calls: (first step, number of steps) of each, see parallel.calls.
    window: how far the data is ahead of the step.

  Returns:
    A context of an iterator over (batch, curriculum), stacked in a call of
    several steps.
  """
  read = batches(experiment, source)

  def inputs(i):
    start, count = calls[i]
    parts = [
      build.network_inputs(experiment, read(window + step))
      for step in range(start, start + count)
    ]
    curriculum = sharding.curricula(experiment.method, start, count)
    return backend.batch(*parts), backend.replicate(curriculum)

  return contextlib.closing(pipeline.prefetch(inputs, 0, len(calls)))


def _check_unchanged(
  meta: dict[str, Any], fixed: dict[str, Any], name: str
) -> None:
  """Raises UserError where a path leads to others than the run began with."""
  began, found = (m.get("data_fingerprint") for m in (meta, fixed))
  if began not in (None, found):
    raise errors.UserError(
      f"{name} holds other images than those the run in the work "
      f"directory was trained on (fingerprint {found}, not {began}); correct "
      "data.path, or use another --workdir"
    )
  began, found = meta.get("frozen", {}), fixed["frozen"]
  for which in sorted(began.keys() | found.keys()):
    if began.get(which) != found.get(which):
      key = {"lpips": "lpips_path"}.get(which, which)
      raise errors.UserError(
        f"method.{key} has other weights (digest {found.get(which)}) than "
        "those the run in the work directory began with "
        f"({began.get(which)}); correct method.{key}, or use another "
        "--workdir"
      )
