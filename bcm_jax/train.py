"""Training: from a config to a trained, evaluated run.

`train_and_evaluate(config, workdir)` can be called from a notebook; main.py
calls it for --mode=train. The training loop is `Run._train_steps`; the step,
training/train_step.py, differentiates the method's losses. Damaged checkpoints,
non-finite steps, preemption, concurrent writers and hangs are handled as
docs/reliability.md describes.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import itertools
import os
import time
from typing import Any

from flax import serialization
import jax
import ml_collections

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import digests
from bcm_jax.checkpoint import recovery
from bcm_jax.checkpoint import runs
from bcm_jax.checkpoint import workdir_lock
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.data import pipeline
from bcm_jax.evaluation import evaluate
from bcm_jax.training import fault_injection
from bcm_jax.training import goodput
from bcm_jax.training import hooks
from bcm_jax.training import metric_logger
from bcm_jax.training import multihost
from bcm_jax.training import nonfinite
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from bcm_jax.training import watchdog
from bcm_jax.utils import addresses
from bcm_jax.utils import files
from bcm_jax.utils import provenance

# File that marks a finished run; launchers do not restart it.
DONE = "DONE"


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str
) -> train_state.TrainState:
  """Trains a model, then evaluates it; resumes a run in the work directory.

  Args:
    config: resolved config, see config/resolve.py.
    workdir: folder for config.json, metrics.jsonl, tensorboard/, checkpoints/,
      goodput/ and, at the end, eval/, samples/, image grids and DONE. All hosts
      need the same folder.

  Returns:
    The final state, on the host.

  Raises:
    UserError: the config is invalid or not that of the run in workdir, another
      job writes to workdir, or rollbacks did not end non-finite steps.
    MachineError: checkpoints cannot be written.
    Preempted: SIGTERM or SIGINT was received; a checkpoint is saved. With
      nothing to save SIGTERM ends the process, also while it compiles.
  """
  began = time.monotonic()
  experiment = build.build(config)
  # Checks weights and references before the run writes anything.
  evaluate.check_before_training(experiment)
  source = experiment.training_source()
  batches(experiment, source)  # Checks the batch size before compiling.
  with contextlib.ExitStack() as stack:
    lock = _on_process_0(
        workdir, lambda: lock_workdir(experiment.config, workdir)
    )
    release = lock.release if lock is not None else lambda: None
    stack.callback(release)
    accounts = goodput.Goodput(
        workdir if jax.process_index() == 0 else None, began=began
    )
    preemption = multihost.PreemptionSignal(release)
    stack.enter_context(preemption.listening())
    run = Run(experiment, workdir, source, accounts, preemption, lock)
    state = run.train()
    run.finish(state)
  return state


@dataclasses.dataclass
class Run:
  """Training from the newest checkpoint to the last step.

  Attributes:
    experiment: method, optimizers, devices and settings.
    workdir: work directory.
    source: training images.
    accounts: wall-clock breakdown.
    preemption: detects SIGTERM.
    lock: lock of the work directory; None on all processes except process 0.
  """

  experiment: build.Experiment
  workdir: str
  source: image_source.Source
  accounts: goodput.Goodput
  preemption: multihost.PreemptionSignal
  lock: workdir_lock.WorkdirLock | None

  def __post_init__(self):
    experiment = self.experiment
    self.backend = experiment.backend()
    step = train_step.make_step(
        experiment.method, experiment.optimizers(),
        experiment.step_options(self.backend),
    )
    # Step functions for one step per call and for parallel.substeps.
    self.step_fns = {
        several: self.backend.compile(step, several)
        for several in (False, True)
    }
    self.compiled: set[Any] = set()
    self.calls = itertools.count()
    self.watchdog = watchdog.Watchdog(
        experiment.training.watchdog_timeout_secs,
        os.path.join(self.workdir, nonfinite.FOLDER,
                     f"stacks-host{jax.process_index()}.txt"),
    )
    self.frozen = build.load_frozen(experiment)
    # Inputs that checkpoints do not contain and that a run may not change.
    fixed = {
        "data_fingerprint": image_source.fingerprint(self.source),
        "frozen": {k: digests.tree_digest(v) for k, v in self.frozen.items()},
    }
    settings = experiment.checkpoint
    self.saver = checkpoint.CheckpointSaver(
        checkpoint.Checkpoints(
            runs.checkpoint_dir(self.workdir), settings.keep,
            settings.keep_every,
        ),
        {"config": resolve.to_json(experiment.config),
         "version": __version__, **fixed},
        settings.max_failures, settings.retry_secs, self._sleep,
    )
    self.recovery = recovery.Recovery(
        self.workdir, self.backend, self.saver, self._create,
        lambda: build.create_state(experiment), self.frozen,
        lambda meta: resolve.check_checkpoint(
            meta, experiment.config, self.workdir
        ),
        fixed, self.source.name, experiment.frozen_keys(),
        experiment.training.max_rollbacks,
    )

  def train(self) -> train_state.TrainState:
    """Trains up to the last step.

    Returns:
      The final state, on the host.

    Raises:
      UserError: max_rollbacks is reached, or another job took the lock.
      MachineError: checkpoints cannot be written.
      Preempted: SIGTERM was received; a checkpoint is saved.
    """
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.saver.saved)
      with self.accounts.part("init"):
        state = self.recovery.start()
        # Writes only after all checks, also of the checkpoint.
        _on_process_0(
            self.workdir,
            lambda: begin_run(self.experiment.config, self.workdir),
        )
      fault_injection.point("config_written")
      self.accounts.begin(self._step_of(state))
      if self._step_of(state) >= self.experiment.training.num_steps:
        return self.backend.fetch(state.saved())
      stack.enter_context(self.preemption.deferred())
      stack.callback(self.watchdog.start().close)
      while True:
        try:
          return self._train_steps(state)
        except nonfinite.NotFinite as e:
          # The traceback keeps the old state alive; drop it before restoring
          # to free device memory.
          error = e.with_traceback(None)
        with self.accounts.part("rollback"):
          state = None
          self._check_lock(True)
          if self.recovery.exhausted(error):
            raise self._give_up(error)
          self.latest = None
          state = self.recovery.roll_back(error, self.data_offset)

  def _train_steps(
      self, state: train_state.TrainState
  ) -> train_state.TrainState:
    """Trains from state.step to the last step; returns the state on the host.

    Raises:
      NotFinite: too many consecutive steps were not finite.
      Preempted: SIGTERM was received; a checkpoint is saved.
    """
    experiment, method = self.experiment, self.experiment.method
    total = experiment.training.num_steps
    every = experiment.checkpoint.every_steps
    first = self._step_of(state)
    self.data_offset = int(self.backend.fetch(state.data_offset))
    self.accounts.begin(first)
    began = time.monotonic()
    guard = nonfinite.Guard(experiment.training.max_consecutive_nonfinite)
    # A call runs one or several steps on the devices, up to the next save.
    calls = sharding.calls(
        method, first, total, experiment.parallel.substeps, (every,)
    )
    with (
        self._logger(state, first) as logger,
        stream(
            experiment, self.source, self.backend, calls, self.data_offset
        ) as batches,
    ):
      for start, count in calls:
        with self.accounts.part("data"):
          batch, curriculum = next(batches)
        state, metrics = self._train_step(
            state, batch, curriculum, method.phase(start), start, count
        )
        self.latest, step = state, start + count
        logger(step, count, metrics)
        preempted = self.preemption.reached(next(self.calls))
        last = preempted or step == total
        saving = last or step % every == 0
        # Checks for non-finite steps before saving, so that a restart sees the
        # same state.
        guard.check(step, metrics, wait=saving, last=step == total)
        self.watchdog.progress(step)
        self.accounts.progress(step)
        self._check_lock(saving)
        if saving:
          with self.accounts.part("checkpoint"), logger.report.timed("save"):
            logger.writer.flush()
            self._save(step, state, last)
        if preempted:
          raise errors.Preempted(
              f"step {step} of {total} is saved in {self.workdir}; the same "
              "command resumes the run"
          )
      seconds = hooks.format_secs(time.monotonic() - began)
      logger.progress.note(f"trained {total - first} steps in {seconds}")
    return self.backend.fetch(state.saved())

  def _train_step(self, state, batch, curriculum, phase, start, count):
    """Calls the step function; the first call per phase and count compiles."""
    part = contextlib.nullcontext()
    if (phase, count) not in self.compiled:
      self.compiled.add((phase, count))
      part = self.accounts.part("compile")
    try:
      with part, jax.profiler.StepTraceAnnotation("train", step_num=start + 1):
        state, metrics = self.step_fns[count > 1](
            state, batch, curriculum, phase
        )
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      raise errors.UserError(
          "parallel.microbatch_size_per_device: got "
          f"{self.experiment.parallel.microbatch_size_per_device}, expected a "
          f"step {start + 1} that fits the devices' memory "
          f"({' '.join(str(e).split())[:160]}); lower it, set "
          "model.remat=True, or shard the state by parallel.fsdp=0 and "
          "parallel.sharding=fsdp"
      ) from e
    return state, self.backend.fetch(metrics)

  def _logger(self, state, first: int) -> metric_logger.MetricLogger:
    config, method = self.experiment.config, self.experiment.method
    return metric_logger.MetricLogger(
        self.workdir,
        f"training {config.method.name} on {config.data.name}, batch "
        f"{config.training.batch_size}",
        self.backend.fetch(state.networks[method.sampled_network].params),
        resolve.flatten(config),
        first, config.training.num_steps, config.log.every_steps,
        config.log.progress_secs, config.log.profile,
    )

  def _step_of(self, state) -> int:
    return int(self.backend.fetch(state.step))

  def _sleep(self, seconds: float) -> None:
    with self.watchdog.paused():
      time.sleep(seconds)

  def _create(self) -> train_state.TrainState:
    """Creates the state before the first step, on the host."""
    method, training = self.experiment.method, self.experiment.training
    start_from = {
        name: self.frozen[network.init_from]
        for name, network in method.networks.items() if network.init_from
    }
    if training.init_from is not None:
      start_from[method.sampled_network] = runs.load_params(
          training.init_from, training.init_average
      )
    try:
      return self.backend.fetch(self.backend.create(
          lambda params: build.create_state(self.experiment, params),
          start_from,
      ))
    except ValueError as e:
      if not start_from or isinstance(e, errors.UserError):
        raise
      source = f"training.init_from={training.init_from}"
      if training.init_from is None:
        key = method.networks[method.sampled_network].init_from
        source = f"method.{key}={self.experiment.config.method[key]}"
      raise errors.UserError(
          f"{source}: {e}; use a run of this config's network, with or "
          "without the second time branch"
      ) from e

  def finish(self, state: train_state.TrainState) -> None:
    """Evaluates the final state, then writes DONE.

    Raises:
      UserError: another job took the lock.
    """
    experiment, workdir = self.experiment, self.workdir
    total = experiment.training.num_steps
    with self.accounts.part("eval"):
      average, params = runs.choose(
          experiment.method.sampled_network,
          serialization.to_state_dict(state),
          experiment.config.sample.average,
          "sample.average",
      )
      params = multihost.to_host(params)
      evaluate.finish(experiment, workdir, total, average, params)
    self.accounts.save(total, total)
    fault_injection.point("before_done")
    self._check_lock(True)
    if jax.process_index() == 0:
      facts = {"step": total, "version": __version__}
      files.write_json(os.path.join(workdir, DONE), facts)

  def _check_lock(self, committing: bool) -> None:
    """Checks the lock of the work directory.

    Args:
      committing: whether to look for another owner now, not at the next beat.

    Raises:
      UserError: another job has taken it over.
    """
    if self.lock is None:
      return
    if self.lock.lost or (committing and not self.lock.look()):
      raise errors.UserError(
          f"--workdir: got {self.workdir}, which another job took over while "
          "this one did not respond, expected one writer; this job stops"
      )

  def _save(self, step: int, state: train_state.TrainState, last: bool) -> None:
    save = self.saver.finish if last else self.saver.save
    save(step, self.backend.fetch(state.saved()))
    self.watchdog.progress(step)
    self.accounts.save(step, self.saver.newest)

  def _give_up(self, error: nonfinite.NotFinite) -> errors.UserError:
    """Writes diagnostics; returns the error that ends the run."""
    position = self.data_offset + error.step - 1
    max_rollbacks = self.experiment.training.max_rollbacks
    batch = batches(self.experiment, self.source)(position)
    state = multihost.to_host(self.backend.fetch(self.latest.saved()))
    folder = "the folder in the log of process 0"
    if jax.process_index() == 0:
      facts = {
          "position": position, "rollbacks": max_rollbacks,
          "facts": provenance.facts(self.experiment.config),
      }
      try:
        folder = nonfinite.write_bundle(
            self.workdir, error, state, batch, facts
        )
      except OSError as e:
        folder = f"no file ({e.strerror})"
    return errors.UserError(
        f"{error}; {max_rollbacks} rollbacks did not help; metrics, tensors "
        f"and images of that step are in {folder}; lower "
        "optimizer.learning_rate, set optimizer.grad_clip, or check the images"
    )


def batches(
    experiment: build.Experiment, source: image_source.Source
) -> pipeline.Batches:
  """Returns the function position -> this host's part of the global batch."""
  config = experiment.config
  return pipeline.Batches(
      source, config.seed, config.training.batch_size, flip=config.data.flip,
      process_index=jax.process_index(), process_count=jax.process_count(),
  )


def stream(
    experiment: build.Experiment,
    source: image_source.Source,
    backend: sharding.Backend,
    calls: list[tuple[int, int]],
    data_offset: int,
) -> contextlib.AbstractContextManager[Iterator[tuple[Any, Any]]]:
  """Prefetches the batches and curricula of calls to the devices.

  Args:
    experiment: data and method.
    source: training images.
    backend: places the arrays.
    calls: (first step, number of steps) of each call, see sharding.calls.
    data_offset: see TrainState.

  Returns:
    A context manager of an iterator over (batch, curriculum); the arrays of a
    call with several steps are stacked.
  """
  read = batches(experiment, source)

  def inputs(i):
    start, count = calls[i]
    parts = [
        build.network_inputs(experiment, read(data_offset + step))
        for step in range(start, start + count)
    ]
    curriculum = sharding.curricula(experiment.method, start, count)
    return backend.batch(*parts), backend.replicate(curriculum)

  return contextlib.closing(pipeline.prefetch(inputs, 0, len(calls)))


def _on_process_0(workdir: str, action: Callable[[], Any]) -> Any:
  """Calls a function on process 0; returns its result, None on the others.

  Raises:
    UserError, MachineError: on all processes, if process 0 fails.
  """
  result = error = None
  if jax.process_index() == 0:
    try:
      result = action()
    except (errors.UserError, errors.MachineError) as e:
      error = e
    except OSError as e:
      error = errors.of_file(e)
      if not isinstance(error, errors.MachineError):
        error = errors.UserError(
            f"--workdir: got {workdir} ({e.filename}: {e.strerror}), expected "
            "a writable folder; move what is in the way or choose another"
        )
  multihost.raise_everywhere(error)
  return result


def lock_workdir(
    config: ml_collections.ConfigDict, workdir: str
) -> workdir_lock.WorkdirLock:
  """Creates and locks a work directory.

  Args:
    config: resolved config. It is compared with config.json of a run without a
      checkpoint; checkpoint/recovery.py compares it with a checkpoint.
    workdir: work directory.

  Returns:
    The lock of the directory; the caller releases it.

  Raises:
    UserError: the run in the directory has another config, or another job holds
      the lock.
    OSError: the directory is not writable.
  """
  addresses.check_local("--workdir", workdir)
  os.makedirs(workdir, exist_ok=True)
  with contextlib.ExitStack() as stack:
    lock = stack.enter_context(workdir_lock.WorkdirLock(workdir))
    saved = checkpoint.Checkpoints(runs.checkpoint_dir(workdir))
    run = resolve.of_run(workdir)
    if run is not None and not saved.all_steps():
      resolve.check_resume(run, config)
    stack.pop_all()  # The caller releases the lock.
  return lock


def begin_run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes config.json; removes DONE, as the run trains or evaluates again."""
  os.makedirs(runs.checkpoint_dir(workdir), exist_ok=True)
  with contextlib.suppress(FileNotFoundError):
    os.remove(os.path.join(workdir, DONE))
  resolve.write(config, workdir)
