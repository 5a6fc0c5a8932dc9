"""The one training loop.

`train_and_evaluate(config, workdir)` can be called from a notebook; main.py
is a thin shell around it.
"""

import collections
import contextlib
import dataclasses
import os
import time
from typing import Any

from absl import logging
from flax import serialization
import jax
import ml_collections
import numpy as np

from bcm_jax import __version__
from bcm_jax import config as configs
from bcm_jax import errors
from bcm_jax import evaluate
from bcm_jax import experiment as experiments
from bcm_jax import options
from bcm_jax import runs
from bcm_jax.data import pipeline
from bcm_jax.data import source as sources
from bcm_jax.training import checkpoint
from bcm_jax.training import hooks
from bcm_jax.training import parallel
from bcm_jax.training import state as states
from bcm_jax.training import step as steps
from bcm_jax.training import writers

# Steps that the guard looks back, so that it never waits for the device.
_LAG = 2


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str
) -> states.TrainState:
  """Trains, resuming if the work directory holds a run, then evaluates.

  Args:
    config: resolved config, see config.resolve.
    workdir: receives config.json, metrics.jsonl, tensorboard/, checkpoints/,
      and at the end eval/, samples/ and pictures.

  Returns:
    The final state.

  Raises:
    UserError: for a config that contradicts itself or the run in workdir, or
      for a run of non-finite steps.
  """
  experiment = experiments.build(config)
  config = experiment.config
  # First of all: what is missing stops it before it writes.
  evaluate.check_before_training(experiment)
  source = experiment.source("train")
  prepare_workdir(config, workdir)
  training: options.Training = experiment.section("training")
  saving: options.Checkpoint = experiment.section("checkpoint")
  with checkpoint.Checkpoints(
      runs.checkpoint_dir(workdir), saving.keep, saving.keep_every
  ) as saved:
    state = _start(experiment, saved, source)
    first = int(state.step)
    if first < training.num_steps:
      state = _train(experiment, source, workdir, saved, state)
  average, params = runs.choose(
      experiment.method.sampled,
      serialization.to_state_dict(state),
      config.sample.average,
      "sample.average",
  )
  evaluate.finish(experiment, workdir, training.num_steps, average, params)
  return state


def prepare_workdir(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Makes the directory, or checks that its run may go on; writes config.json.

  Raises:
    UserError: another config's run is there, or it cannot be written.
  """
  run = configs.of_run(workdir)
  if run is not None:
    configs.check_resume(run, config)
  try:
    os.makedirs(workdir, exist_ok=True)
    configs.write(config, workdir)
  except OSError as e:
    raise errors.UserError(
        f"cannot write to --workdir={workdir}: {e.strerror}; choose another"
    ) from e


def _start(
    experiment: experiments.Experiment,
    saved: checkpoint.Checkpoints,
    source: sources.Source,
) -> states.TrainState:
  """The newest good checkpoint, or a new state."""
  training: options.Training = experiment.section("training")
  if saved.all_steps():
    template = jax.eval_shape(lambda: _create(experiment, None))
    step, state, meta = saved.restore(template)
    _check_same_images(meta, source)
    logging.info("resuming at step %d", step)
    return state
  start_from = None
  if training.init_from is not None:
    start_from = {
        experiment.method.sampled: runs.load_params(
            training.init_from, training.init_average
        )
    }
  try:
    return jax.jit(lambda start: _create(experiment, start))(start_from)
  except ValueError as e:
    if start_from is None:
      raise
    raise errors.UserError(
        f"training.init_from={training.init_from}: {e}; its network must be "
        "this one, but for the second time branch"
    ) from e


def _check_same_images(meta: dict[str, Any], source: sources.Source) -> None:
  """Raises UserError where data.path leads to others than the run began with.
  """
  found = sources.fingerprint(source)
  if meta.get("data_fingerprint", found) != found:
    raise errors.UserError(
        f"{source.name} holds other images than those the run in the work "
        f"directory was trained on (fingerprint {found}, not "
        f"{meta['data_fingerprint']}); correct data.path, or use another "
        "--workdir"
    )


def _create(experiment, start_from) -> states.TrainState:
  images, labels = experiments.example_batch(experiment)
  return states.create(
      experiment.method,
      experiment.optimizers(),
      experiment.section("training").ema_rates,
      experiment.config.seed,
      images,
      labels,
      start_from,
      loss_scaling=experiment.config.model.dtype == "float16",
      ema_stds=experiment.section("training").ema_stds,
  )


def _runner(experiment: experiments.Experiment) -> Any:
  """The devices' adapter: jit over a mesh, or pmap."""
  training: options.Training = experiment.section("training")
  parallel.check_batch(
      training.batch_size, training.microbatches, jax.device_count()
  )
  if training.parallel == "pmap":
    return parallel.Pmap(tuple(jax.local_devices()))
  return parallel.Jit(parallel.make_mesh())


@dataclasses.dataclass
class _Guard:
  """Stops the run after too many skipped steps in a row.

  It reads a step's metrics two steps later, when they are there anyway.
  """

  limit: int
  waiting: collections.deque = dataclasses.field(
      default_factory=collections.deque
  )

  def check(self, step: int, metrics: dict[str, Any], wait: bool = False):
    """Takes the metrics of a step; raises UserError over the limit."""
    self.waiting.append((step, metrics))
    while self.waiting and (wait or len(self.waiting) > _LAG):
      at, old = self.waiting.popleft()
      in_row = int(old["skipped_in_row"])
      if in_row >= self.limit:
        values = ", ".join(
            f"{k}={float(v):.4g}" for k, v in sorted(old.items())
        )
        raise errors.UserError(
            f"step {at}: {in_row} steps in a row were not finite ({values}); "
            "the parameters are still those of the last good step and saved. "
            "Lower optimizer.learning_rate, set optimizer.grad_clip, or look "
            "for bad images"
        )


@dataclasses.dataclass
class _Watch:
  """All that reports on a run: metrics, progress, profile, the guard."""

  writer: writers.MetricWriter
  report: Any
  profile: Any
  progress: hooks.Progress
  guard: _Guard
  log: options.Log

  def __call__(self, step: int, total: int, metrics: dict[str, Any]) -> None:
    """Takes a finished step's metrics, read only where they are shown."""
    self.progress.update(step, loss=metrics["loss"])
    self.report(step)
    self.profile(step)
    if step % self.log.every_steps == 0 or step == total:
      self.writer.write_scalars(
          step, {k: float(v) for k, v in metrics.items()}
      )


def _watch(experiment, workdir, state, stack) -> _Watch:
  """Opens the writers and hooks of a run; the stack closes them."""
  config, first = experiment.config, int(state.step)
  training: options.Training = experiment.section("training")
  log: options.Log = experiment.section("log")
  writer = writers.create_writer(
      workdir, jax.process_index() == 0, resume_step=first
  )
  stack.callback(writer.close)
  if first == 0:
    writer.write_hparams(configs.flatten(configs.to_json(config)))
    hooks.log_parameter_overview(
        state.players[experiment.method.sampled].params
    )
  progress = hooks.Progress(
      training.num_steps, first, every_secs=log.progress_secs
  )
  stack.callback(progress.close)
  sizes = [x.size for p in state.players.values()
           for x in jax.tree.leaves(p.params)]
  progress.note(
      f"training {config.method.name} on {config.data.name}: steps {first} to "
      f"{training.num_steps}, batch {training.batch_size}, "
      f"{sum(sizes):,} parameters, "
      f"{jax.device_count()} {jax.devices()[0].platform} device(s); compiling"
  )
  return _Watch(
      writer,
      hooks.report_progress(training.num_steps, writer, every_secs=60.0),
      hooks.profile(workdir, first_profile=first + 10) if log.profile
      else lambda step: None,
      progress,
      _Guard(training.max_skipped_in_row),
      log,
  )


def _batches(experiment, source, runner, first: int, total: int):
  """Batches of steps first .. total - 1, made and put on devices ahead."""
  config = experiment.config
  batches = pipeline.Batches(
      source, config.seed, config.training.batch_size,
      flip=config.data.flip, process_index=jax.process_index(),
      process_count=jax.process_count(),
  )
  return contextlib.closing(pipeline.prefetch(
      lambda step: runner.batch(_network_inputs(experiment, batches(step))),
      first, total,
  ))


def _train(experiment, source, workdir, saved, state) -> states.TrainState:
  """Runs the steps from state.step to num_steps."""
  method = experiment.method
  training: options.Training = experiment.section("training")
  first, total = int(state.step), training.num_steps
  runner = _runner(experiment)
  axis = parallel.AXIS if training.parallel == "pmap" else None
  step_fn = runner.compile(
      steps.make_step(
          method, experiment.optimizers(), experiment.step_options(axis)
      )
  )
  meta = {
      "config": configs.to_json(experiment.config), "version": __version__,
      "data_fingerprint": sources.fingerprint(source),
  }

  with contextlib.ExitStack() as stack:
    watch = _watch(experiment, workdir, state, stack)
    state = runner.replicate(state)

    def save(step):
      with watch.report.timed("checkpoint"):
        saved.save(step, runner.fetch(state), meta)

    began = time.monotonic()
    stream = stack.enter_context(
        _batches(experiment, source, runner, first, total)
    )
    for step, batch in enumerate(stream, first + 1):
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = step_fn(
            state, batch, method.curriculum(step - 1), method.phase(step - 1)
        )
      metrics = runner.fetch(metrics)
      try:
        watch.guard.check(step, metrics, wait=step == total)
      except errors.UserError:
        save(step)
        raise
      watch(step, total, metrics)
      if step % experiment.config.checkpoint.every_steps == 0 or step == total:
        save(step)
    seconds = hooks.format_secs(time.monotonic() - began)
    watch.progress.note(f"trained {total - first} steps in {seconds}")
  return runner.fetch(state)


def _network_inputs(experiment, batch) -> dict[str, np.ndarray]:
  keys = ["image", "index"]
  if experiment.num_classes is not None:
    keys.append("label")
  return {k: batch[k] for k in keys}
