"""Two processes are one run: they agree, go together, and come back together.

Every start is a process of the real command (starts.py), joined by JAX's
distributed runtime as on a pod.
"""

import signal
import socket

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.training import fault_injection
from tests.training import starts
from tests.training import test_rolling_back as rolling_back
from tests.training import tiny_run

pytestmark = pytest.mark.slow

STEPS, EVERY = tiny_run.STEPS, tiny_run.EVERY
# One device a process: two processes have the devices that one has else.
EACH = "parallel.cpu_devices=1"
FSDP = ("parallel.fsdp=2", "parallel.sharding=kernel$=- fsdp,fsdp")
# Seconds of patience instead of five minutes.
HASTY = """
from bcm_jax.training import multihost
multihost.connect.__defaults__ = (*multihost.connect.__defaults__[:-1], 3)
"""
PATIENT = HASTY.replace(", 3)", ", 30)")
LATE = "import time\ntime.sleep(4)\n"
KINDS = {"jit": (), "pmap": ("parallel.backend=pmap",), "fsdp": FSDP}


def address():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


def pair(server, workdir, *flags, codes=("", ""), **environment):
  """The two processes of one start."""
  coordinator = address()
  return [
      server.start(
          workdir, EACH, *flags, f"--coordinator={coordinator}",
          "--num_processes=2", f"--process_id={i}", code=codes[i],
          **environment,
      ) for i in range(2)
  ]


def wait(both, *statuses):
  """Waits for both; a status counts for both where it is alone."""
  for start, status in zip(both, statuses * 2, strict=False):
    start.wait(status)


@pytest.fixture(scope="module")
def unbroken(server, unbroken, tmp_path_factory):
  """Kind -> run of two processes in one start; 'alone' is that of one.

  One process of 'jit' comes late.
  """
  runs = {"alone": unbroken}
  for kind, flags in KINDS.items():
    runs[kind] = tmp_path_factory.mktemp(kind)
    codes = (PATIENT, PATIENT + LATE) if kind == "jit" else ("", "")
    wait(pair(server, runs[kind], *flags, codes=codes), 0)
  return runs


def tree(workdir):
  return checkpoint.Checkpoints(workdir / "checkpoints").read_raw(STEPS)[1]


def assert_close(a, b):
  if isinstance(a, dict):
    assert a.keys() == b.keys()
    for key in a:
      assert_close(a[key], b[key])
  elif a is not None:
    largest = float(np.abs(b).max(initial=0.0))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_does(unbroken, kind):
  alone = unbroken["alone"]
  assert_close(tree(unbroken[kind]), tree(alone))
  lines = zip(
      starts.metrics(unbroken[kind]), starts.metrics(alone), strict=True
  )
  for a, b in list(lines)[1:]:  # After the config.
    assert a.keys() == b.keys()
    np.testing.assert_allclose(
        list(a.values()), list(b.values()), rtol=1e-4
    )


# A process sends itself the notice when a step is done.
TOLD = """
import os, signal
from bcm_jax.training import metric_logger
report = metric_logger.MetricLogger.__call__
def told(self, step, count, metrics):
  report(self, step, count, metrics)
  if step == 5:
    os.kill(os.getpid(), signal.SIGTERM)
metric_logger.MetricLogger.__call__ = told
"""
# Long enough for a notice to pass from one process to the other.
SLOW = starts.slow(0.2)


@pytest.mark.parametrize("told, kind", [(1, "fsdp")])
def test_a_notice_to_one_ends_both_at_the_same_step(
    server, unbroken, tmp_path, told, kind
):
  codes = [SLOW, SLOW]
  codes[told] += TOLD
  both = pair(server, tmp_path, *KINDS[kind], codes=codes)
  wait(both, errors.EXIT_PREEMPTED)
  said = [
      line for start in both for line in start.text.splitlines()
      if line.startswith("preempted: ")
  ]
  assert len(said) == 2 and said[0] == said[1]
  step = int(said[0].split()[2])
  assert 5 < step < STEPS
  assert starts.leaves(tmp_path, step)
  wait(pair(server, tmp_path, *KINDS[kind]), 0)
  starts.assert_same_run(tmp_path, unbroken[kind], STEPS)


def test_a_death_ends_the_other_and_the_next_start_goes_on(
    server, unbroken, tmp_path
):
  for killed in (0, 1):
    both = pair(server, tmp_path, codes=(SLOW, SLOW))
    both[0].until(f"/{STEPS}")
    both[killed].send(signal.SIGKILL)
    both[killed].wait(-signal.SIGKILL)
    left = both[1 - killed].wait(secs=60)
    # Neither done nor a status that tells launchers not to start again.
    assert left not in (0, errors.EXIT_BAD_INPUT)
  wait(pair(server, tmp_path), 0)
  starts.assert_same_run(tmp_path, unbroken["jit"], STEPS)


def test_a_kill_in_a_save_of_cut_tensors_resumes(server, unbroken, tmp_path):
  both = pair(server, tmp_path, *FSDP, TRAINING_FAULT="mid_write:2")
  wait(both, fault_injection.EXIT_KILLED)
  wait(pair(server, tmp_path, *FSDP), 0)
  starts.assert_same_run(tmp_path, unbroken["fsdp"], STEPS)


def test_a_bad_image_on_one_host_is_skipped_and_rolled_back_on_both(
    server, tmp_path
):
  # Both read float images; those of process 1 alone are poisoned.
  flags = (rolling_back.TWO, "training.max_rollbacks=1")
  codes = [rolling_back.poison(), rolling_back.poison(2, 5, 6)]
  both = pair(server, tmp_path / "a", *flags, codes=codes)
  wait(both, 0)
  assert rolling_back.numbers(tmp_path / "a") == [STEPS, 3, 1, STEPS - 1]
  for start in both:
    assert "step 7: 2 steps in a row were not finite" in start.text
    assert "continuing from step 4 with other data" in start.text
  codes = [rolling_back.poison(), rolling_back.poison(*range(5, 99))]
  both = pair(server, tmp_path / "b", *flags, codes=codes)
  wait(both, errors.EXIT_BAD_INPUT)
  for start in both:
    assert "1 rollbacks did not help" in start.text
  assert (tmp_path / "b" / "diagnostics" / "step-6" / "report.json").exists()


def test_a_process_that_never_arrives_is_named(server, tmp_path):
  alone = server.start(
      tmp_path, EACH, f"--coordinator={address()}", "--num_processes=3",
      "--process_id=0", code=HASTY,
  )
  # One that comes late is no trouble, and not named for long.
  late = server.start(
      tmp_path, EACH, *alone.flags[1:3], "--process_id=2", code=HASTY
  )
  for start in (alone, late):
    assert start.wait() not in (0, errors.EXIT_BAD_INPUT)
    assert "not started: process 1\n" in start.text
    assert "waiting: 0, 2;" in start.text
  assert not (tmp_path / "config.json").exists()


def test_a_process_that_comes_late_is_waited_for(unbroken):
  assert (unbroken["jit"] / "DONE").exists()
  assert not (unbroken["jit"] / "arrivals").exists()


def test_bad_input_to_one_ends_both(server, unbroken):
  both = pair(server, unbroken["jit"], "seed=3")
  wait(both, errors.EXIT_BAD_INPUT)
  for start in both:
    assert "seed is 0 there, 3 here" in start.text
