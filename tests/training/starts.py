"""Starts of the real command, cheaply: forks of a process that has imported.

`python -m tests.training.starts` is that process. It has touched no device and
no data; each start is a child of its own with its own JAX, environment,
signals and exit status, and a kill of it is a kill. TensorFlow is hidden, and
the pictures at the end are left out; tests/test_commands.py has both.
"""

import importlib.machinery
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from tests import quick

ROOT = pathlib.Path(__file__).resolve().parents[2]
_CONFIG = pathlib.Path(__file__).with_name("tiny_run.py")


def slow(secs: float = 0.1) -> str:
  """Code for slow steps, so that what comes from outside meets one."""
  return f"""
import time
from bcm_jax.training import metric_logger
at_once = metric_logger.MetricLogger.__call__
def slowly(self, step, count, metrics):
  at_once(self, step, count, metrics)
  time.sleep({secs})
metric_logger.MetricLogger.__call__ = slowly
"""


class Start:
  """A process that was started, by its number."""

  def __init__(
      self, server: "Server", pid: int, log: pathlib.Path, flags: tuple
  ):
    self._server, self.pid, self._log, self.flags = server, pid, log, flags

  def wait(self, status: int | None = None, secs: float = 120.0) -> int:
    """Its exit status, negative for a signal; asserts that it is `status`."""
    end = time.monotonic() + secs
    while (found := self._server.ask(poll=self.pid)) is None:
      if time.monotonic() > end:
        self.send(signal.SIGKILL)
        raise AssertionError(f"still running after {secs} s:\n{self.text}")
      time.sleep(0.02)
    assert status in (None, found), f"exit status {found}:\n{self.text}"
    return found

  def send(self, number: int) -> None:
    """Sends a signal."""
    os.kill(self.pid, number)

  @property
  def text(self) -> str:
    """What it has printed."""
    return self._log.read_text(errors="replace")

  def until(self, said: str, secs: float = 120.0) -> "Start":
    """Waits until it has printed something."""
    end = time.monotonic() + secs
    while said not in self.text:
      assert time.monotonic() < end, f"never said {said!r}:\n{self.text}"
      time.sleep(0.01)
    return self


class Server:
  """Forks starts; leaving the context ends it."""

  def __init__(self, folder: pathlib.Path, cache: str | None = None):
    self._folder, self._count = pathlib.Path(folder), 0
    self._one = threading.Lock()
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick.flags(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_COMPILATION_CACHE_DIR": cache
        or os.environ.get("JAX_COMPILATION_CACHE_DIR")  # Of the session.
        or str(self._folder / "compiled"),
    }
    self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.starts"], cwd=ROOT, env=env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )

  def ask(self, **request) -> object:
    """Sends a request to the process, returns its reply."""
    with self._one:
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
      return json.loads(self._process.stdout.readline())

  def start(
      self, workdir: os.PathLike | str, *flags: str, code: str = "",
      **environment: str,
  ) -> Start:
    """Starts the command in a child.

    Args:
      workdir: of the run.
      flags: of the command; those with a dot and no dash, as
        'training.num_steps=8', are keys of the config.
      code: Python to run in the child before the command.
      environment: variables to set in the child.
    """
    with self._one:
      self._count += 1
      log = self._folder / f"start-{self._count}.log"
    log.touch()
    argv = [f"--config={_CONFIG}", f"--workdir={workdir}"] + [
        f if f.startswith("-") else f"--config.{f}" for f in flags
    ]
    pid = self.ask(
        argv=argv, code=code, environment=environment, log=str(log)
    )
    return Start(self, pid, log, flags)

  def __enter__(self) -> "Server":
    return self

  def __exit__(self, *exc_info) -> None:
    self._process.stdin.close()
    self._process.wait()


def leaves(workdir: os.PathLike | str, step: int) -> list[dict]:
  """Path and digest of every tensor of a checkpoint."""
  meta = pathlib.Path(workdir, "checkpoints", str(step), "meta", "metadata")
  return json.loads(meta.read_text())["leaves"]


def metrics(workdir: os.PathLike | str) -> list[dict]:
  """The lines of metrics.jsonl, apart from times."""
  lines = []
  for text in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines():
    line = json.loads(text)
    if not {"steps_per_sec", "uptime"} & set(line):
      lines.append(line)
  return lines


def assert_same_run(workdir, other, step: int) -> None:
  """Asserts that two runs are the same bit for bit, apart from times."""
  assert leaves(workdir, step) == leaves(other, step)
  assert metrics(workdir) == metrics(other)


class _Hidden(importlib.machinery.PathFinder):
  """Finds all but TensorFlow."""

  @classmethod
  def find_spec(cls, name, path=None, target=None):
    """As if neither were installed."""
    if name.split(".")[0] in ("tensorflow", "tensorboard"):
      return None
    return super().find_spec(name, path, target)


def _child(argv, code, environment, log) -> None:
  """Becomes a start; never returns."""
  os.setsid()
  out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for stream in (1, 2):
    os.dup2(out, stream)
  os.environ.update(environment)
  status = 1
  try:
    exec(code, {})
    from bcm_jax import main
    main.main(["bcm_jax", *argv])
  except SystemExit as e:
    status = e.code or 0
  except BaseException:
    import traceback
    traceback.print_exc()
  finally:
    try:
      import atexit
      atexit._run_exitfuncs()  # JAX leaves the other processes there.
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)


def _poll(pid: int) -> int | None:
  found, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if found else None


def _serve() -> None:
  sys.meta_path = [
      _Hidden if f is importlib.machinery.PathFinder else f
      for f in sys.meta_path
  ]
  # All that a start would import; none of it makes threads or devices.
  import grain  # noqa: F401
  import orbax.checkpoint  # noqa: F401

  from bcm_jax import train  # noqa: F401
  from bcm_jax.data import digits
  from bcm_jax.evaluation import evaluate
  from bcm_jax.evaluation import time_search  # noqa: F401
  from bcm_jax.tools import aot_compile  # noqa: F401
  from bcm_jax.tools import inspect_config  # noqa: F401
  from tests.training import tiny_run

  digits.digit_arrays("train")
  tiny_run.register()
  evaluate.finish = lambda *args: None
  replies = os.fdopen(os.dup(1), "w")
  running = set()
  for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
      reply = _poll(request["poll"])
      if reply is not None:
        running.discard(request["poll"])
    else:
      reply = os.fork()
      if not reply:
        _child(**request)
      running.add(reply)
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
  for pid in running:  # Who asked for them is gone.
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
  _serve()
