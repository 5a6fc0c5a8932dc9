"""All that reports on a run while it trains: metrics, progress, a profile."""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.training import hooks
from bcm_jax.training import metric_writers


@dataclasses.dataclass
class Watch:
  """Takes the metrics of every call, read only where they are shown.

  Attributes:
    writer: metrics.jsonl and TensorBoard.
    report: steps a second, an ETA.
    profile: a trace of a few steps.
    progress: a bar, or lines.
    every_steps: between lines of metrics.
    total: steps of the run.
    newest: metric -> (its last values, the one of them that is the newest).
  """

  writer: metric_writers.MetricWriter
  report: Any
  profile: Any
  progress: hooks.Progress
  every_steps: int
  total: int
  newest: dict[str, tuple[Any, int]] = dataclasses.field(default_factory=dict)

  def __call__(self, step: int, count: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of the `count` steps that end with `step`."""
    # With several players the loss of the first one of the phase.
    loss = next(v for k, v in metrics.items() if k.split("/")[-1] == "loss")
    self.progress.update(step, loss=loss if count == 1 else loss[-1])
    for i in range(count):
      at = step - count + 1 + i
      self.report(at)
      self.profile(at)
      # Players that take turns: of each what it said last.
      self.newest |= {k: (v, i) for k, v in metrics.items()}
      if at % self.every_steps and at != self.total:
        continue
      self.writer.write_scalars(
          at, {k: float(np.reshape(v, -1)[i])
               for k, (v, i) in self.newest.items()}
      )


def open_watch(
    experiment: build.Experiment,
    workdir: str,
    first: int,
    params: Any,
    stack: contextlib.ExitStack,
) -> Watch:
  """Opens the writers and hooks of a run that starts after a step.

  Args:
    first: finished steps.
    params: of the sampled player, for the table of parameters.
    stack: closes what is opened.
  """
  config = experiment.config
  training = experiment.training
  log = experiment.log
  writer = metric_writers.create_writer(
      workdir, jax.process_index() == 0, resume_step=first
  )
  stack.callback(writer.close)
  if first == 0:
    writer.write_hparams(resolve.flatten(resolve.to_json(config)))
    hooks.log_parameter_overview(params)
  progress = hooks.Progress(
      training.num_steps, first, every_secs=log.progress_secs
  )
  stack.callback(progress.close)
  size = sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(params))
  hosts = jax.process_count()
  progress.note(
      f"training {config.method.name} on {config.data.name}: steps {first} to "
      f"{training.num_steps}, batch {training.batch_size}, {size:,} "
      f"parameters, {jax.device_count()} {jax.devices()[0].platform} device(s)"
      f"{f' on {hosts} hosts' if hosts > 1 else ''}; compiling"
  )
  return Watch(
      writer,
      hooks.report_progress(training.num_steps, writer, every_secs=60.0),
      hooks.profile(workdir, first_profile=first + 10) if log.profile
      else lambda step: None,
      progress,
      log.every_steps,
      training.num_steps,
  )
