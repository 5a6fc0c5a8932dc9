"""Metric writers: JSON lines, and TensorBoard if CLU can be imported.

All writers have the interface of clu.metric_writers.MetricWriter. CLU's own
writers need TensorFlow; without it only the JSONL file is written. TensorBoard
shows the training metrics as run '.', and evaluations and image grids as run
'eval' (`write_evaluation`).
"""

from collections.abc import Mapping
import contextlib
import importlib
import json
import math
import os
from typing import Any, Protocol

from absl import logging
from flax import traverse_util
import numpy as np

from bcm_jax import errors
from bcm_jax.training import fault_injection
from bcm_jax.utils import files

METRICS_FILE = "metrics.jsonl"


class MetricWriter(Protocol):
  """Subset of clu.metric_writers.MetricWriter that training uses."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

  def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

  def write_histograms(
      self,
      step: int,
      arrays: Mapping[str, Any],
      num_buckets: Mapping[str, int] | None = None,
  ) -> None: ...

  def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


def import_clu(module: str) -> Any | None:
  """Imports clu.<module>; returns None if it or TensorFlow is unavailable.

  A broken TensorFlow may raise any exception; training continues without it.
  """
  # TensorFlow's start-up log would break the progress bar.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    imported = importlib.import_module(f"clu.{module}")
  except ImportError as e:
    logging.info("clu.%s is not available (%s)", module, e)
    return None
  except Exception as e:
    logging.warning("clu.%s cannot be imported (%s: %s); using the fallback",
                    module, type(e).__name__, e)
    return None
  return imported


def create_writer(
    logdir: str, primary: bool = True, resume_step: int | None = None
) -> MetricWriter:
  """Creates the writer of a run.

  Args:
    logdir: folder for `metrics.jsonl` and `tensorboard/`.
    primary: whether this host writes; other hosts get a NullWriter.
    resume_step: remove JSON lines of later steps first (see
      `JsonlWriter.truncate_after`).

  Returns:
    A MetricWriter. JSON lines are written immediately, TensorBoard events by a
    thread.
  """
  if not primary:
    return NullWriter()
  jsonl = JsonlWriter(logdir)
  if resume_step is not None:
    jsonl.truncate_after(resume_step)
  clu_writers = import_clu("metric_writers")
  if clu_writers is None:
    logging.warning(
        "no TensorBoard files, because TensorFlow cannot be imported; the "
        "metrics are in %s", jsonl.path
    )
    return jsonl
  _hide_gpus_from_tensorflow()
  board = clu_writers.AsyncWriter(
      clu_writers.SummaryWriter(os.path.join(logdir, "tensorboard")))
  return clu_writers.MultiWriter([jsonl, _HostValues(board)])


def write_evaluation(
    workdir: str, step: int, result: Mapping[str, Any],
    grids: Mapping[str, np.ndarray], prefix: str = "",
) -> None:
  """Writes metrics and image grids of a checkpoint for TensorBoard.

  Does nothing without TensorFlow.

  Args:
    workdir: work directory; the files are in tensorboard/eval.
    step: step of the checkpoint.
    result: content of a result file of mode eval, or {}.
    grids: name -> uint8 [H, W, C].
    prefix: starts all names.
  """
  clu_writers = import_clu("metric_writers")
  if clu_writers is None:
    return
  _hide_gpus_from_tensorflow()
  writer = _HostValues(
      clu_writers.SummaryWriter(os.path.join(workdir, "tensorboard", "eval"))
  )
  numbers = dict(result.get("samplers", {}))
  numbers |= {
      f"inversion_{k}": v for k, v in result.get("inversion", {}).items()
  }
  if "likelihood" in result:
    numbers["likelihood"] = result["likelihood"]
  writer.write_scalars(step, {
      f"{prefix}{name}/{metric}": value
      for name, metrics in numbers.items() for metric, value in metrics.items()
      if type(value) in (int, float) and metric not in ("nfe", "noise")
  })
  writer.write_images(
      step, {f"{prefix}{name}": grid[None] for name, grid in grids.items()}
  )
  writer.flush()
  writer.close()


class NullWriter:
  """Ignores all calls; for hosts that do not write."""

  def __getattr__(self, name: str) -> Any:
    return lambda *args, **kwargs: None


class JsonlWriter:
  """Writes `<logdir>/metrics.jsonl`, one JSON object per line.

  Scalars are written as {"step": 3, "loss": 0.5}. Non-finite values are the
  strings "NaN", "Infinity" and "-Infinity", which float() parses, so that the
  file stays valid JSON. Other lines have a "kind" key after the step
  (hyperparameters have no step). Images and histograms are reduced to shapes
  and moments.

  Lines have no time stamps: a resumed and an uninterrupted run write equal
  lines.
  """

  def __init__(self, logdir: str):
    """Opens the file for appending; removes a partial last line of a crash."""
    os.makedirs(logdir, exist_ok=True)
    self.path = os.path.join(logdir, METRICS_FILE)
    if os.path.lexists(self.path) and not os.path.isfile(self.path):
      raise errors.UserError(
          f"{self.path}: got a folder, pipe or dangling link, expected a file; "
          "move it away"
      )
    _drop_partial_line(self.path)
    self._file = open(self.path, "ab", buffering=0)
    self._waiting = b""

  def write_scalars(self, step, scalars):
    """Writes {name: scalar}.

    Raises:
      ValueError: an array has more than one element.
    """
    values = {name: _plain_float(x) for name, x in scalars.items()}
    self._write({"step": int(step), **values})

  def write_images(self, step, images):
    """Writes the shapes of [H, W, C] or [N, H, W, C] images."""
    shapes = {name: list(np.shape(x)) for name, x in images.items()}
    self._write({"step": int(step), "kind": "images", "shapes": shapes})

  def write_texts(self, step, texts):
    """Writes {name: text}."""
    self._write({"step": int(step), "kind": "texts", "texts": dict(texts)})

  def write_histograms(self, step, arrays, num_buckets=None):
    """Writes size, mean, std, min and max of each array."""
    del num_buckets
    moments = {name: _moments(x) for name, x in arrays.items()}
    self._write({"step": int(step), "kind": "histograms", "arrays": moments})

  def write_hparams(self, hparams):
    """Writes hyperparameters unless the file already has the same line."""
    record = {"kind": "hparams", "hparams": _jsonable(hparams)}
    with open(self.path, encoding="utf-8") as lines:
      # A restarted run calls this again; an uninterrupted run does not.
      if any(_parse(line) == record for line in lines if '"hparams"' in line):
        return
    self._write(record)

  def truncate_after(self, step: int) -> None:
    """Removes lines of later steps and lines that are not JSON objects.

    Called when a run resumes from `step`, so that the file equals that of an
    uninterrupted run. The file is replaced atomically.
    """
    self._file.close()
    with open(self.path, encoding="utf-8", errors="replace") as lines:
      kept = [line for line in lines if _is_up_to(line, step)]
    with files.replacing(self.path) as out:
      out.write("".join(kept).encode())
      out.flush()
      os.fsync(out.fileno())
    self._file = open(self.path, "ab", buffering=0)

  def flush(self):
    """Flushes all lines to disk."""
    self._append(b"")
    with contextlib.suppress(OSError):
      os.fsync(self._file.fileno())

  def close(self):
    """Closes the file; a second call does nothing."""
    if not self._file.closed:
      self._append(b"")
    self._file.close()

  def _write(self, record: dict[str, Any]) -> None:
    # Unbuffered: a killed job loses at most one line.
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    half = len(line) // 2
    fault_injection.point("metrics_half", lambda: self._append(line[:half]))
    self._append(line)

  def _append(self, text: bytes) -> None:
    """Writes bytes; if the disk is full, keeps them for the next call."""
    full = bool(self._waiting)
    self._waiting += text
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
    except OSError as e:  # A full disk is reported by the checkpoint saver.
      if not full:
        logging.warning("cannot write %s: %s", self.path, e.strerror)


class _HostValues:
  """Converts values for a threaded writer; disables it after an error.

  The values are converted before they reach the thread: a device array may be
  donated before the thread reads it, TensorFlow rejects an array of shape (1,)
  as a scalar, and TensorBoard's plugin rejects None and lists as
  hyperparameters. Errors of the thread, such as a full disk, are raised by a
  later call; they disable the writer and the run continues.
  """

  def __init__(self, writer: Any):
    self._writer = writer
    self._broken = False

  def __getattr__(self, name: str) -> Any:
    return lambda *args: self._pass(name, *args)

  def _pass(self, name: str, *args: Any) -> None:
    if self._broken:
      return
    try:
      getattr(self._writer, name)(*args)
    except Exception as e:
      self._broken = True
      logging.warning("TensorBoard logging is disabled: %s: %s",
                      type(e).__name__, e)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self._pass("write_scalars", int(step),
               {name: _number(x) for name, x in scalars.items()})

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    self._pass("write_images", int(step),
               {name: np.array(x) for name, x in images.items()})

  def write_histograms(
      self,
      step: int,
      arrays: Mapping[str, Any],
      num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    arrays = {name: np.array(x, np.float64) for name, x in arrays.items()}
    self._pass("write_histograms", int(step), arrays, num_buckets)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    flat = traverse_util.flatten_dict(_jsonable(hparams), sep=".")
    self._pass("write_hparams", {
        name: x if isinstance(x, (bool, int, float, str)) else json.dumps(x)
        for name, x in flat.items()
    })


def _hide_gpus_from_tensorflow() -> None:
  """Prevents TensorFlow from reserving GPU memory that JAX needs."""
  try:
    tf = importlib.import_module("tensorflow")
    tf.config.set_visible_devices([], "GPU")
  except (ImportError, RuntimeError) as e:  # TensorFlow uses them already.
    logging.info("cannot hide GPUs from TensorFlow (%s)", e)


def _number(value: Any) -> float:
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"expected a single number, got shape {array.shape}")
  return float(array.reshape(()))


def _plain_float(value: Any) -> float | str:
  number = _number(value)
  if math.isfinite(number):
    return number
  if math.isnan(number):
    return "NaN"
  return "Infinity" if number > 0 else "-Infinity"


def _moments(array: Any) -> dict[str, Any]:
  x = np.asarray(array).astype(np.float64)
  names = ("mean", "std", "min", "max") if x.size else ()
  return {"size": x.size,
          **{name: _plain_float(getattr(x, name)()) for name in names}}


def _jsonable(value: Any) -> Any:
  """Converts nested mappings, sequences, arrays and numbers to JSON."""
  if isinstance(value, Mapping) or hasattr(value, "items"):
    return {str(key): _jsonable(x) for key, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [_jsonable(x) for x in value]
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    return _plain_float(value)
  if hasattr(value, "tolist"):
    return _jsonable(np.asarray(value).tolist())
  return str(value)


def _parse(line: str) -> Any:
  try:
    return files.parse_json(line)
  except ValueError:
    return None


def _is_up_to(line: str, step: int) -> bool:
  """Returns whether a line is a whole record of a step <= `step`."""
  record = _parse(line)
  if not isinstance(record, dict) or not line.endswith("\n"):
    return False
  record_step = record.get("step", 0)
  return isinstance(record_step, int) and record_step <= step


def _drop_partial_line(path: str) -> None:
  """Truncates the file after its last newline."""
  if not os.path.exists(path):
    return
  with open(path, "rb+") as file:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
      start = max(0, end - 65536)
      file.seek(start)
      newline = file.read(end - start).rfind(b"\n")
      if newline >= 0:
        end = start + newline + 1
        break
      end = start
    file.truncate(end)
