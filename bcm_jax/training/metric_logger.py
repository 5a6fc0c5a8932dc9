"""Metric logging, progress and profiling of a training run."""

from collections.abc import Mapping
import contextlib
from typing import Any

from absl import logging
import jax
import numpy as np

from bcm_jax.training import hooks
from bcm_jax.training import metric_writers


class MetricLogger:
  """Buffers device metrics; fetches them only when they are logged.

  A context manager: leaving the context closes the writers and the display.

  Attributes:
    writer: writes metrics.jsonl and TensorBoard files.
    report: hook that logs steps/s and an ETA.
    progress: progress bar on a terminal, else progress lines.
  """

  def __init__(
      self,
      workdir: str,
      title: str,
      params: Any,
      hparams: Mapping[str, Any],
      first: int,
      total: int,
      every_steps: int,
      progress_secs: float = 30.0,
      profile: bool = False,
  ):
    """Opens the writers of a run.

    Args:
      workdir: work directory.
      title: printed before the first step, with sizes and devices.
      params: parameters of the sampled network, for the parameter table.
      hparams: 'section.key' -> value, written at the first start.
      first: number of finished steps.
      total: number of the last step.
      every_steps: steps between two lines of metrics.jsonl.
      progress_secs: seconds between progress lines without a terminal.
      profile: whether to trace a few steps for TensorBoard.
    """
    self._total, self._every = total, every_steps
    self._newest: dict[str, tuple[Any, int]] = {}
    self._stack = contextlib.ExitStack()
    self.writer = metric_writers.create_writer(
        workdir, jax.process_index() == 0, resume_step=first
    )
    self._stack.callback(self.writer.close)
    if first == 0:
      self.writer.write_hparams(dict(hparams))
      logging.info("parameters:\n%s", hooks.parameter_table(params))
    self.progress = hooks.Progress(total, first, every_secs=progress_secs)
    self._stack.callback(self.progress.close)
    self.report = hooks.report_progress(total, self.writer, every_secs=60.0)
    self._profile = (
        hooks.profile(workdir, first_profile=first + 10) if profile
        else lambda step: None
    )
    size = sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(params))
    hosts = jax.process_count()
    self.progress.note(
        f"{title}: steps {first} to {total}, {size:,} parameters, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
        f"{f' on {hosts} hosts' if hosts > 1 else ''}; compiling"
    )

  def __enter__(self) -> "MetricLogger":
    return self

  def __exit__(self, *exc_info) -> None:
    self._stack.close()

  def __call__(self, step: int, count: int, metrics: dict[str, Any]) -> None:
    """Logs a call of several steps.

    Args:
      step: last step of the call.
      count: number of steps of the call.
      metrics: name -> scalar on the device, [count] if count > 1.
    """
    # The loss of the first network of the phase.
    loss = next(v for k, v in metrics.items() if k.split("/")[-1] == "loss")
    self.progress.update(step, loss=loss if count == 1 else loss[-1])
    for i in range(count):
      at = step - count + 1 + i
      self.report(at)
      self._profile(at)
      # Networks outside of this phase keep their previous metrics.
      self._newest |= {k: (v, i) for k, v in metrics.items()}
      if at % self._every and at != self._total:
        continue
      self.writer.write_scalars(
          at, {k: float(np.reshape(v, -1)[i])
               for k, (v, i) in self._newest.items()}
      )
