"""Periodic actions of training: progress reports, profiles, a progress bar.

`report_progress` and `profile` return CLU's periodic actions if CLU can be
imported (it needs TensorFlow), else small classes with the same interface.
`Progress` uses tqdm if it is installed, else plain lines as in a log file.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib
import sys
import time
from typing import Any, TextIO

from absl import logging
from clu import parameter_overview
import jax
import numpy as np

from bcm_jax.training import metric_writers

_REFRESH_SECS = 0.5


def report_progress(
    num_train_steps: int,
    writer: metric_writers.MetricWriter | None = None,
    every_secs: float | None = 60.0,
    every_steps: int | None = None,
) -> Any:
  """Returns a hook that writes `steps_per_sec` and `uptime` [s], logs an ETA.

  Args:
    num_train_steps: total number of steps; the last one is reported.
    writer: receives the two scalars; None only logs.
    every_secs: interval of the reports in seconds; None disables it.
    every_steps: report at multiples of this; then call the hook every step.

  Returns:
    clu.periodic_actions.ReportProgress or `ReportProgress`: `hook(step)`
    after each step, `with hook.timed(name):` around parts to measure.
  """
  clu_actions = metric_writers.import_clu("periodic_actions")
  cls = ReportProgress if clu_actions is None else clu_actions.ReportProgress
  return cls(num_train_steps=num_train_steps, writer=writer,
             every_secs=every_secs, every_steps=every_steps)


def profile(
    logdir: str,
    first_profile: int = 10,
    num_profile_steps: int = 5,
    every_secs: float | None = None,
) -> Any:
  """Returns a hook that traces a few steps with jax.profiler for TensorBoard.

  Args:
    logdir: folder of the trace.
    first_profile: the step after which the first trace starts.
    num_profile_steps: number of steps per trace.
    every_secs: interval of further traces in seconds; None traces only once.

  Returns:
    clu.periodic_actions.Profile or `Profile`, called as `hook(step)`. On a
    platform without tracing it logs a warning and does nothing.
  """
  clu_actions = metric_writers.import_clu("periodic_actions")
  if clu_actions is None:
    cls = Profile
  else:
    cls = functools.partial(clu_actions.Profile, profile_duration_ms=None)
  return cls(logdir=logdir, first_profile=first_profile,
             num_profile_steps=num_profile_steps, every_secs=every_secs)


def parameter_table(params: Any) -> str:
  """Returns a table of names, shapes, dtypes and sizes of parameters."""
  return parameter_overview.get_parameter_overview(params, include_stats=False)


class ReportProgress:
  """Fallback for clu.periodic_actions.ReportProgress without TensorFlow."""

  def __init__(
      self,
      *,
      num_train_steps: int | None = None,
      writer: metric_writers.MetricWriter | None = None,
      every_secs: float | None = 60.0,
      every_steps: int | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    self._total = num_train_steps
    self._writer = writer
    self._every_secs = every_secs
    self._every_steps = every_steps
    self._clock = clock
    self._start = clock()
    self._previous: tuple[int, float] | None = None
    self._parts: dict[str, float] = {}

  def __call__(self, step: int, t: float | None = None) -> bool:
    """Reports if due; returns whether it did. As in CLU, the first call only
    starts the clock."""
    now = self._clock() if t is None else t
    if self._previous is None:
      self._previous = (step, now)
      return False
    if step == self._previous[0] or not self._is_due(step, now):
      return False
    self._report(step, now)
    self._previous = (step, now)
    return True

  @contextlib.contextmanager
  def timed(
      self, name: str, wait_jax_async_dispatch: bool = True
  ) -> Iterator[None]:
    """Adds the wall time of the block to the named part of the report."""
    # Unlike CLU, no effects barrier: it would stall the device.
    del wait_jax_async_dispatch
    start = self._clock()
    try:
      yield
    finally:
      spent = self._clock() - start
      self._parts[name] = self._parts.get(name, 0.0) + spent

  def _is_due(self, step: int, now: float) -> bool:
    if self._every_steps is not None and step % self._every_steps == 0:
      return True
    if step == self._total:
      return True
    return (self._every_secs is not None
            and now - self._previous[1] > self._every_secs)

  def _report(self, step: int, now: float) -> None:
    step0, t0 = self._previous
    rate = (step - step0) / max(now - t0, 1e-9)
    uptime = self._clock() - self._start
    message = f"{rate:.1f} steps/s"
    if self._total:
      message += (f", {100 * step / self._total:.1f}% ({step}/{self._total})"
                  f", ETA: {format_secs((self._total - step) / rate)}")
    if self._parts:
      shares = ", ".join(f"{100 * spent / max(uptime, 1e-9):.1f}% {name}"
                         for name, spent in sorted(self._parts.items()))
      message += f" ({format_secs(uptime)}: {shares})"
    logging.info("%s", message)
    if self._writer is not None:
      self._writer.write_scalars(step, {"steps_per_sec": rate})
      self._writer.write_scalars(step, {"uptime": uptime})


class Profile:
  """Fallback for clu.periodic_actions.Profile without TensorFlow."""

  def __init__(
      self,
      *,
      logdir: str,
      first_profile: int = 10,
      num_profile_steps: int = 5,
      every_secs: float | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    self._logdir = logdir
    self._first = first_profile
    self._num_steps = num_profile_steps
    self._every_secs = every_secs
    self._clock = clock
    self._last = clock()
    self._stop_at: int | None = None
    self._enabled = True

  def __call__(self, step: int, t: float | None = None) -> bool:
    """Starts or stops a trace if due; returns whether one was started."""
    now = self._clock() if t is None else t
    if self._stop_at is not None:
      if step >= self._stop_at:
        self._stop_at = None
        self._enabled &= self._try(jax.profiler.stop_trace)
      return False
    repeat = (
        self._every_secs is not None and now - self._last > self._every_secs
    )
    if not self._enabled or not (step == self._first or repeat):
      return False
    self._last = now
    self._enabled = self._try(jax.profiler.start_trace, self._logdir)
    self._stop_at = step + self._num_steps if self._enabled else None
    return self._enabled

  def _try(self, function: Callable[..., Any], *args: Any) -> bool:
    try:
      function(*args)
    except Exception as e:  # A run must not stop because profiling fails.
      logging.warning("profiling is off: %s: %s", type(e).__name__, e)
      return False
    return True


class Progress:
  """Progress display of training.

  On a terminal it is a tqdm bar; elsewhere it prints lines such as
  `step 1200/3000  loss 0.1234  6.1 steps/s  ETA 4:55` at the first step (the
  end of compilation), then at most every `every_secs`, and at the last step.
  """

  def __init__(
      self,
      total: int,
      initial: int = 0,
      stream: TextIO | None = None,
      every_secs: float = 30.0,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the display.

    Args:
      total: number of the last step.
      initial: the step from which a resumed run starts.
      stream: output; None for sys.stderr.
      every_secs: minimum seconds between two lines if the output is not a
        terminal.
      clock: returns monotonic seconds; replaced by tests.
    """
    self._total = total
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._bar = self._make_bar(initial)
    self._every = every_secs if self._bar is None else _REFRESH_SECS
    self._shown: tuple[int, float] | None = None

  def update(self, step: int, **scalars: Any) -> None:
    """Sets the last finished step.

    Scalars are fetched only when the display is redrawn, since fetching a
    device array waits for the device.
    """
    now = self._clock()
    if self._shown is not None and step < self._total:
      if now - self._shown[1] < self._every:
        return
    elif self._shown is not None and self._shown[0] == step:
      return
    texts = {name: f"{float(np.asarray(x)):.4g}"
             for name, x in scalars.items()}
    if self._bar is not None:
      self._bar.set_postfix(texts, refresh=False)
      self._bar.update(step - self._bar.n)
    else:
      self._print(self._line(step, now, texts))
    self._shown = (step, now)

  def note(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
      self._stream.flush()
    else:
      self._print(text)

  def close(self) -> None:
    """Ends the display; a second call does nothing."""
    if self._bar is not None:
      self._bar.close()

  def _make_bar(self, initial: int) -> Any | None:
    if not self._stream.isatty():
      return None
    try:
      tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
      return None
    # `update` limits the rate, so that scalars are fetched only when drawn.
    return tqdm(total=self._total, initial=initial, file=self._stream,
                unit="step", dynamic_ncols=True, mininterval=0, miniters=0)

  def _line(self, step: int, now: float, texts: dict[str, str]) -> str:
    parts = [f"step {step}/{self._total}"]
    parts += [f"{name} {text}" for name, text in texts.items()]
    if self._shown is not None and now > self._shown[1]:
      rate = (step - self._shown[0]) / (now - self._shown[1])
      parts.append(f"{rate:.1f} steps/s")
      if rate > 0:
        parts.append(f"ETA {format_secs((self._total - step) / rate)}")
    return "  ".join(parts)

  def _print(self, text: str) -> None:
    print(text, file=self._stream, flush=True)


def format_secs(seconds: float) -> str:
  """Formats a duration as m:ss or h:mm:ss."""
  minutes, secs = divmod(round(max(seconds, 0.0)), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{secs:02d}"
  return f"{minutes}:{secs:02d}"
