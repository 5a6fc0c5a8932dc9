"""A process without progress ends, and says where it hung."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

from bcm_jax import errors
from bcm_jax.training import watchdog

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(code, *args):
  return subprocess.run(
      [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
      env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
      text=True, timeout=60, check=False,
  )


def test_a_hang_ends_the_process_with_all_stacks(tmp_path):
  file = tmp_path / "diagnostics" / "stacks.txt"
  began = time.monotonic()
  done = run("""
      import sys, threading, time
      from bcm_jax.training import watchdog
      def in_another_thread():
        time.sleep(1e9)
      def where_it_hangs():
        time.sleep(1e9)
      threading.Thread(target=in_another_thread, daemon=True).start()
      dog = watchdog.Watchdog(0.5, sys.argv[1]).start()
      dog.progress(41)
      where_it_hangs()
      """, file)
  assert done.returncode == errors.EXIT_HANGING
  assert time.monotonic() - began < 20
  assert "no step finished for 0 s after step 41" in done.stderr
  assert str(file) in done.stderr
  for text in (done.stderr, file.read_text()):
    assert "in where_it_hangs" in text and "in in_another_thread" in text


def test_where_python_is_stuck_the_process_ends_too(tmp_path):
  """No thread of Python's runs while native code holds its lock."""
  done = run("""
      import ctypes, sys
      from bcm_jax.training import watchdog
      watchdog.Watchdog(0.5, sys.argv[1]).start()
      ctypes.PyDLL(None).sleep(1000)
      """, tmp_path / "stacks.txt")
  assert done.returncode not in (0, errors.EXIT_BAD_INPUT)
  assert "Timeout" in done.stderr and "<module>" in done.stderr


class Clock:
  """Seconds that pass when they are told to."""

  now = 0.0

  def __call__(self):
    return self.now


def watched(tmp_path, secs):
  """A dog with a clock of its own, whose thread is not started."""
  ended, clock = [], Clock()
  dog = watchdog.Watchdog(
      secs, str(tmp_path / "stacks.txt"), clock, ended.append
  )
  dog._stop = Looks()
  return dog, clock, ended


class Looks:
  """In place of the event that the thread waits with: a few looks."""

  def __init__(self):
    self.left = 0

  def wait(self, seconds):
    self.left -= 1
    return self.left < 0

  def set(self):
    pass


def look(dog, times=1):
  dog._stop.left = times
  dog._watch()
  dog.close()


def test_it_does_not_bite_while_there_is_progress(tmp_path):
  dog, clock, ended = watched(tmp_path, 10)
  for step in range(5):
    clock.now += 9
    look(dog)
    dog.progress(step)
  assert not ended
  clock.now += 10.1
  look(dog)
  assert ended == [errors.EXIT_HANGING]


def test_a_pause_does_not_count(tmp_path):
  dog, clock, ended = watched(tmp_path, 10)
  with dog.paused():
    clock.now += 100
    look(dog)
    with dog.paused():
      clock.now += 100
    look(dog)
  clock.now += 9
  look(dog)
  assert not ended
  clock.now += 2
  look(dog)
  assert ended == [errors.EXIT_HANGING]


def test_a_disk_that_cannot_be_written_does_not_save_the_process(
    tmp_path, capsys
):
  (tmp_path / "stacks.txt").mkdir()
  dog, clock, ended = watched(tmp_path, 10)
  clock.now += 11
  look(dog)
  assert ended == [errors.EXIT_HANGING]
  assert "Is a directory" in capsys.readouterr().err


def test_none_is_started_for_zero_seconds(tmp_path):
  dog = watchdog.Watchdog(0, str(tmp_path / "stacks.txt")).start()
  assert dog._thread is None
  dog.close()


def test_closing_ends_the_watch(tmp_path):
  ended = []
  dog = watchdog.Watchdog(
      0.2, str(tmp_path / "stacks.txt"), end=ended.append
  ).start()
  dog.close()
  time.sleep(0.5)
  assert not ended and not (tmp_path / "stacks.txt").exists()
