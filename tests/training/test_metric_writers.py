"""Writers and hooks: one contract, with CLU and TensorFlow or without."""

import importlib
import io
import json
import logging
import os
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.training import hooks
from bcm_jax.training import metric_writers as writers


@pytest.fixture(params=["clu", "fallback"])
def backend(request, monkeypatch):
  """Runs a test with CLU, and again as if TensorFlow were not installed."""
  if request.param == "fallback":
    real = importlib.import_module

    def import_module(name, *args):
      if name.split(".")[0] in ("tensorflow", "clu"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
      return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
  return request.param


def read(logdir):
  """All records, by a parser that refuses NaN."""

  def refuse(name):
    raise ValueError(name)

  text = (pathlib.Path(logdir) / writers.METRICS_FILE).read_text()
  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def board_tags(logdir):
  """Names of all that TensorBoard would show."""
  from tensorboard.backend.event_processing import event_file_loader

  (path,) = (logdir / "tensorboard").glob("*tfevents*")
  events = event_file_loader.EventFileLoader(str(path)).Load()
  return {v.tag for event in events for v in event.summary.value}


HPARAMS = {"lr": 1e-3, "name": "x", "none": None, "sizes": (1, 2),
           "net": {"width": 8, "init": {}}, "array": np.ones(2)}


@pytest.mark.slow
def test_writer_conformance(tmp_path, backend):
  writer = writers.create_writer(str(tmp_path))
  writer.write_hparams(HPARAMS)
  writer.write_scalars(1, {"loss": 0.5, "n": 3})
  writer.write_scalars(
      2, {"loss": jnp.float32(0.25), "a": np.ones(1), "h": jnp.bfloat16(2)})
  writer.write_images(2, {"grid": np.zeros((1, 8, 8, 3), np.uint8)})
  writer.write_texts(2, {"plan": "two steps"})
  writer.write_histograms(2, {"w": np.arange(5.0)})
  writer.write_scalars(
      3, {"a": np.nan, "b": np.inf, "c": jnp.float32(-np.inf)})
  last = jnp.float32(7)
  writer.write_scalars(4, {"last": last})
  last.delete()  # As donation does.
  writer.flush()
  records = read(tmp_path)
  writer.close()
  assert [r.get("kind") for r in records] == [
      "hparams", None, None, "images", "texts", "histograms", None, None]
  assert records[0]["hparams"] == {
      "lr": 1e-3, "name": "x", "none": None, "sizes": [1, 2],
      "net": {"width": 8, "init": {}}, "array": [1.0, 1.0]}
  assert records[1] == {"step": 1, "loss": 0.5, "n": 3.0}
  assert records[2] == {"step": 2, "loss": 0.25, "a": 1.0, "h": 2.0}
  assert all(next(iter(r)) == "step" for r in records[1:])
  assert records[3]["shapes"] == {"grid": [1, 8, 8, 3]}
  assert records[4]["texts"] == {"plan": "two steps"}
  assert records[5]["arrays"]["w"]["max"] == 4.0
  assert records[6] == {
      "step": 3, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
  assert records[7] == {"step": 4, "last": 7.0}
  assert (tmp_path / "tensorboard").exists() == (backend == "clu")
  if backend == "clu":
    assert {"loss", "h", "last", "grid", "plan", "w"} <= board_tags(tmp_path)


def test_scalars_must_be_scalars(tmp_path, backend):
  writer = writers.create_writer(str(tmp_path))
  with pytest.raises(ValueError, match="single number"):
    writer.write_scalars(1, {"loss": np.ones(3)})
  assert read(tmp_path) == []


def test_other_hosts_write_nothing(tmp_path):
  writer = writers.create_writer(str(tmp_path / "x"), primary=False)
  for name, args in (("write_scalars", (1, {"a": 1})),
                     ("write_images", (1, {})), ("write_texts", (1, {})),
                     ("write_histograms", (1, {})), ("write_hparams", ({},)),
                     ("flush", ()),
                     ("close", ())):
    getattr(writer, name)(*args)
  assert list(tmp_path.iterdir()) == []


def test_fallback_has_the_methods_of_clu_that_are_used():
  from clu import metric_writers

  used = {k for k in vars(writers.MetricWriter) if k[0] != "_"}
  assert used >= {"write_scalars", "flush", "close"}
  assert used <= metric_writers.MetricWriter.__abstractmethods__
  assert all(callable(getattr(writers.JsonlWriter, name)) for name in used)


def train(logdir, first, last, resume_step=None):
  writer = writers.create_writer(str(logdir), resume_step=resume_step)
  writer.write_hparams(HPARAMS)
  for step in range(first, last + 1):
    writer.write_scalars(step, {"loss": 1 / step})
    if step % 2 == 0:
      writer.write_texts(step, {"note": f"at {step}"})
  writer.close()


@pytest.mark.parametrize("tail", ["", '{"step": 8, "lo', '{"step": 2', "\0\0"])
def test_resumed_file_equals_an_uninterrupted_one(tmp_path, tail):
  train(tmp_path / "straight", 1, 10)
  train(tmp_path / "resumed", 1, 7)
  path = tmp_path / "resumed" / writers.METRICS_FILE
  with open(path, "a") as file:
    file.write(tail)  # What a crash leaves.
  train(tmp_path / "resumed", 5, 10, resume_step=4)
  straight = (tmp_path / "straight" / writers.METRICS_FILE).read_bytes()
  assert path.read_bytes() == straight
  assert not list(path.parent.glob("*.tmp"))


def test_half_a_line_is_dropped_before_appending(tmp_path):
  train(tmp_path, 1, 3)
  path = tmp_path / writers.METRICS_FILE
  whole = path.read_bytes()
  path.write_bytes(whole + b'{"step": 4')
  writers.JsonlWriter(str(tmp_path)).close()
  assert path.read_bytes() == whole
  path.write_bytes(b'{"step"')
  writers.JsonlWriter(str(tmp_path)).close()
  assert path.read_bytes() == b""


def test_truncation_is_atomic(tmp_path, monkeypatch):
  writer = writers.JsonlWriter(str(tmp_path))
  for step in range(5):
    writer.write_scalars(step, {"a": step})

  def crash(*args):
    raise OSError("power loss")

  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(OSError, match="power loss"):
    writer.truncate_after(2)
  assert [r["step"] for r in read(tmp_path)] == list(range(5))


def test_broken_tensorflow_only_warns(tmp_path, monkeypatch, caplog):
  def broken(name, *args):
    raise AttributeError("protobuf is too new")

  monkeypatch.setattr(importlib, "import_module", broken)
  writer = writers.create_writer(str(tmp_path))
  assert isinstance(writer, writers.JsonlWriter)
  assert "protobuf is too new" in caplog.text
  (said,) = (r for r in caplog.records if "TensorBoard" in r.getMessage())
  assert "metrics.jsonl" in said.getMessage()


@pytest.mark.slow
def test_without_tensorflow_in_a_fresh_process(tmp_path):
  """Neither the import of the modules nor their use needs TensorFlow."""
  code = """
import sys
sys.modules["tensorflow"] = None
from bcm_jax.training import hooks, metric_writers as writers
writer = writers.create_writer(sys.argv[1])
assert type(writer) is writers.JsonlWriter
report = hooks.report_progress(3, writer)
assert type(report) is hooks.ReportProgress
assert type(hooks.profile(sys.argv[1])) is hooks.Profile
for step in (1, 2, 3):
  writer.write_scalars(step, {"loss": 1.0})
  report(step)
import numpy as np
hooks.parameter_table({"a": {"w": np.ones((2, 3))}})
assert not any(m.startswith("tensorflow.") for m in sys.modules)
"""
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
      [sys.executable, "-c", code, str(tmp_path)], capture_output=True,
      text=True, timeout=120, check=False,
      env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr
  assert sum("loss" in r for r in read(tmp_path)) == 3


# Hooks.


def test_report_progress_conformance(tmp_path, backend):
  writer = writers.JsonlWriter(str(tmp_path))
  report = hooks.report_progress(10, writer, every_secs=100.0)
  with report.timed("compile", wait_jax_async_dispatch=False):
    pass
  start = time.monotonic()
  triggered = [step for step in range(1, 11)
               if report(step, start + 60.0 * (step - 1))]
  # 101 s after the first call, after that report, and at the last step.
  assert triggered == [3, 5, 7, 9, 10]
  rates = [r["steps_per_sec"] for r in read(tmp_path) if "steps_per_sec" in r]
  assert rates == pytest.approx([1 / 60] * 5)
  assert sum("uptime" in r for r in read(tmp_path)) == 5


def test_fallback_report_logs_rate_and_eta(caplog):
  clock = Clock()
  report = hooks.ReportProgress(
      num_train_steps=300, every_steps=100, every_secs=None, clock=clock)
  report(1)
  clock.now = 10.0
  with report.timed("eval"):
    clock.now = 20.0
  with caplog.at_level(logging.INFO, logger="absl"):
    assert report(101 - 1)
    assert not report(150)
  (record,) = caplog.records
  text = record.getMessage()
  assert text.startswith("5.0 steps/s, 33.3% (100/300), ETA: 0:4")
  assert "50.0% eval" in text


def test_profile_conformance(tmp_path, backend, monkeypatch):
  calls = []
  monkeypatch.setattr(
      "jax.profiler.start_trace", lambda d: calls.append(("start", d)))
  monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
  hook = hooks.profile(str(tmp_path), first_profile=3, num_profile_steps=2)
  seen = []
  for step in range(1, 9):
    hook(step)
    seen.append(len(calls))
  assert calls == [("start", str(tmp_path)), "stop"]
  assert seen == [0, 0, 1, 1, 2, 2, 2, 2]


def test_unsupported_profiler_is_a_no_op(tmp_path, backend, monkeypatch):
  def unsupported(logdir):
    raise RuntimeError("no profiler here")

  monkeypatch.setattr("jax.profiler.start_trace", unsupported)
  hook = hooks.profile(str(tmp_path), first_profile=2, num_profile_steps=1)
  for step in range(1, 6):
    hook(step)


def test_parameter_table():
  text = hooks.parameter_table({"dense": {"kernel": np.ones((2, 3))}})
  assert "dense/kernel" in text and "(2, 3)" in text


# What a person sees.


class Clock:
  """A clock that stands where it is put."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self):
    return True


class Unread:
  """A scalar that must not be read: it would stall the device."""

  def __array__(self, *args, **kwargs):
    raise AssertionError("read although nothing is drawn")


def test_plain_lines_are_rare_and_right():
  clock, stream = Clock(), io.StringIO()
  progress = hooks.Progress(3000, stream=stream, every_secs=30.0, clock=clock)
  progress.update(1, loss=2.0)
  for step in range(2, 301):
    clock.now = (step - 1) * 0.2
    drawn = step in (151, 301)
    progress.update(step, loss=jnp.float32(0.12341) if drawn else Unread())
  clock.now = 60.0
  progress.note("saved step 300")
  progress.update(301, loss=0.5)
  clock.now = 60.1
  progress.update(3000, loss=0.25)
  progress.update(3000, loss=0.25)
  progress.close()
  lines = stream.getvalue().splitlines()
  assert lines[:4] == [
      "step 1/3000  loss 2",
      "step 151/3000  loss 0.1234  5.0 steps/s  ETA 9:30",
      "saved step 300",
      "step 301/3000  loss 0.5  5.0 steps/s  ETA 9:00",
  ]
  assert lines[4].startswith("step 3000/3000  loss 0.25")
  assert lines[4].endswith("ETA 0:00")
  assert len(lines) == 5


def test_bar_on_a_terminal():
  clock, stream = Clock(), Terminal()
  progress = hooks.Progress(100, initial=40, stream=stream, clock=clock)
  progress.update(41, loss=0.5)
  clock.now = 0.1
  progress.update(42, loss=Unread())
  clock.now = 1.0
  progress.update(60, loss=0.25)
  progress.note("a picture was written")
  progress.update(100, loss=0.125)
  progress.close()
  progress.close()
  text = stream.getvalue()
  assert "41/100" in text and "loss=0.5" in text
  assert "42/100" not in text
  assert "60/100" in text and "loss=0.25" in text
  assert "100/100" in text and "loss=0.125" in text
  assert "\ra picture was written\n" in text


def test_terminal_without_tqdm_gets_lines(monkeypatch):
  real = importlib.import_module

  def import_module(name, *args):
    if name == "tqdm":
      raise ModuleNotFoundError(name)
    return real(name, *args)

  monkeypatch.setattr(importlib, "import_module", import_module)
  stream = Terminal()
  hooks.Progress(10, stream=stream).update(1, loss=1.0)
  assert stream.getvalue() == "step 1/10  loss 1\n"


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (59.6, "1:00"), (295, "4:55"), (3600, "1:00:00"),
     (90061, "25:01:01"), (-3, "0:00")])
def test_format_secs(seconds, text):
  assert hooks.format_secs(seconds) == text


@pytest.mark.parametrize("text", [
    "[" * 100_000, "[]", '{"step": [1]}', "\x00", '{"step": 1e999}',
])
def test_odd_lines_are_removed_on_resuming(tmp_path, text):
  path = tmp_path / writers.METRICS_FILE
  path.write_text('{"step": 1, "loss": 2.0}\n' + text + "\n")
  writer = writers.JsonlWriter(str(tmp_path))
  writer.write_hparams({})
  writer.truncate_after(3)
  writer.close()
  lines = [json.loads(x) for x in path.read_text().splitlines()]
  assert [x.get("step") for x in lines] == [1, None]


@pytest.mark.parametrize("make", [
    os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path),
])
def test_metrics_that_are_no_file_are_refused(tmp_path, make):
  make(tmp_path / writers.METRICS_FILE)
  with pytest.raises(errors.UserError, match=writers.METRICS_FILE):
    writers.JsonlWriter(str(tmp_path))
