"""Other writers, full disks and hangs: seen, told, and survived.

Every start is a process of the real command (starts.py).
"""

import shutil
import signal

import pytest

from bcm_jax import errors
from tests.training import starts
from tests.training import tiny_run
from tests.training.test_resuming import flip_a_bit

pytestmark = pytest.mark.slow

STEPS, EVERY = tiny_run.STEPS, tiny_run.EVERY


# Beats of a tenth of a second instead of a quarter of a minute.
BEATS = """
import time
from bcm_jax.checkpoint import workdir_lock
workdir_lock.WorkdirLock.__init__.__defaults__ = (0.1, time.sleep)
"""


def test_a_second_writer_is_refused(server, unbroken, tmp_path):
  first = server.start(tmp_path, code=BEATS + starts.slow()).until("step ")
  second = server.start(tmp_path, code=BEATS)
  second.wait(errors.EXIT_BAD_INPUT)
  assert f"--workdir: got {tmp_path}, which process {first.pid} on" in (
      second.text
  )
  first.wait(0)
  starts.assert_same_run(tmp_path, unbroken, STEPS)


def test_a_writer_that_was_replaced_stops_before_it_saves(server, tmp_path):
  # It hangs, and does not beat for so long that its next beat is far away.
  first = server.start(tmp_path, code=starts.slow()).until("step ")
  first.send(signal.SIGSTOP)
  second = server.start(tmp_path, code=BEATS)
  second.until("taking over the lock").wait(0)
  whole = starts.leaves(tmp_path, STEPS)
  first.send(signal.SIGCONT)
  first.wait(errors.EXIT_BAD_INPUT)
  assert "which another job took over" in first.text
  assert starts.leaves(tmp_path, STEPS) == whole
  assert (tmp_path / "DONE").exists()


def test_an_unwritable_place_is_an_error_at_once(server, tmp_path):
  (tmp_path / "file").write_text("")
  start = server.start(tmp_path / "file" / "run")
  start.wait(errors.EXIT_BAD_INPUT)
  assert "step 1" not in start.text
  assert "error: --workdir: got " in start.text
  assert "Traceback" not in start.text


# No file of more than 20,000 bytes can be written from step 2 on: the digits'
# state does not fit, a line of metrics does. What is printed goes through a
# process without the limit.
FULL = """
import os, resource, subprocess, time
from bcm_jax.training import metric_logger
cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=1)
os.dup2(cat.stdin.fileno(), 1)
os.dup2(cat.stdin.fileno(), 2)
report = metric_logger.MetricLogger.__call__
def limited(self, step, count, metrics):
  report(self, step, count, metrics)
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  if step == 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  if step == UNTIL:
    time.sleep(1.0)  # The save under way shall meet it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
metric_logger.MetricLogger.__call__ = limited
"""


def test_a_disk_that_is_full_for_a_while_costs_a_save(
    server, unbroken, tmp_path
):
  start = server.start(tmp_path, code=FULL.replace("UNTIL", "5"))
  start.wait(0)
  assert "a checkpoint could not be written" in start.text
  assert "File too large" in start.text
  assert not (tmp_path / "checkpoints" / str(EVERY)).exists()
  starts.assert_same_run(tmp_path, unbroken, STEPS)


def test_a_disk_that_stays_full_ends_the_run_as_the_machines_fault(
    server, unbroken, tmp_path
):
  start = server.start(tmp_path, code=FULL.replace("UNTIL", "None"))
  start.wait(errors.EXIT_MACHINE)
  assert "failure 3 of 3" in start.text
  assert "got 3 consecutive failures" in start.text
  server.start(tmp_path).wait(0)  # There is room again.
  starts.assert_same_run(tmp_path, unbroken, STEPS)


# Nothing at all can be written.
NO_SPACE = """
import resource, subprocess, os
cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=1)
os.dup2(cat.stdin.fileno(), 1)
os.dup2(cat.stdin.fileno(), 2)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "sample", "invert"])
def test_a_full_disk_from_the_start_is_the_machines_fault(
    server, unbroken, tmp_path, mode
):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
  start = server.start(tmp_path, f"--mode={mode}", code=NO_SPACE)
  start.wait(errors.EXIT_MACHINE)
  assert "Traceback" not in start.text
  assert "File too large" in start.text.splitlines()[-1]
  assert all(path.stat().st_size for path in (tmp_path / "lock").iterdir())
  assert not list(tmp_path.rglob("*.tmp"))
  if mode == "train":
    server.start(tmp_path).wait(0)
    starts.assert_same_run(tmp_path, unbroken, STEPS)


def dangling(path):
  path.symlink_to(path / "nowhere")


# What is in the way -> path in the work directory, what is put there.
IN_THE_WAY = {
    "file": ("checkpoints", lambda path: path.write_text("x")),
    "dangling_checkpoints": ("checkpoints", dangling),
    "loop": ("checkpoints", lambda path: path.symlink_to(path)),
    "lock_file": ("lock", lambda path: path.write_text("")),
    "damaged_file": ("damaged", lambda path: path.write_text("")),
    "metrics_folder": ("metrics.jsonl", lambda path: path.mkdir()),
    "metrics_link": ("metrics.jsonl", dangling),
    "rollbacks": ("rollbacks.json", lambda path: path.write_text("[{}]")),
    "done_folder": ("DONE", lambda path: path.mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_is_named_in_one_line(
    server, unbroken, tmp_path, name
):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  flip_a_bit(tmp_path / "checkpoints" / str(STEPS))  # To be set aside.
  place, make = IN_THE_WAY[name]
  path = tmp_path / place
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
  make(path)
  start = server.start(tmp_path)
  start.wait(errors.EXIT_BAD_INPUT)
  assert "Traceback" not in start.text
  assert start.text.splitlines()[-1].startswith("error: ")
  assert place in start.text.splitlines()[-1]


@pytest.mark.slow
def test_an_init_from_that_is_none_leaves_no_config(server, tmp_path):
  """A second start with the right one is not a run of another config."""
  workdir = tmp_path / "run"
  (tmp_path / "old" / "checkpoints").mkdir(parents=True)
  start = server.start(workdir, f"training.init_from={tmp_path / 'old'}")
  start.wait(errors.EXIT_BAD_INPUT)
  assert not (workdir / "config.json").exists()
  server.start(workdir).wait(0)


# Patience is cut short where it hangs, for it must last while all compiles.
HANG = """
import time
from bcm_jax.training import metric_logger
from bcm_jax.training import watchdog
dogs, begin = [], watchdog.Watchdog.start
def start(self):
  dogs.append(self)
  return begin(self)
watchdog.Watchdog.start = start
def stuck(*args):
  dogs[-1]._secs = 1.0
  time.sleep(1e9)
"""
HUNG_LOOP = HANG + """
metric_logger.MetricLogger.__call__ = stuck
"""
# The first save never ends; the run learns of it when it waits for it.
HUNG_DISK = HANG + """
from bcm_jax.checkpoint import checkpoint
def hung(self, *args):
  checkpoint.Checkpoints.wait = stuck
checkpoint.Checkpoints.save = hung
"""


def test_a_hang_ends_with_the_stacks_of_all_threads(server, tmp_path):
  hanging = [
      (tmp_path / name, server.start(
          tmp_path / name, "training.watchdog_timeout_secs=12.0", code=code
      )) for name, code in (("run", HUNG_LOOP), ("disk", HUNG_DISK))
  ]
  for workdir, start in hanging:
    start.wait(errors.EXIT_HANGING)
    stacks = (workdir / "diagnostics" / "stacks-host0.txt").read_text()
    assert "in stuck" in stacks and "in stuck" in start.text
    assert "no step finished for 1 s after step" in start.text
