"""A run that is killed, told to go or misled ends as if nothing had happened.

Every start is a process of the real command (starts.py).
"""

import json
import random
import shutil
import signal
import time

import pytest

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.training import fault_injection
from bcm_jax.training import goodput
from bcm_jax.utils import hashing
from tests.training import starts
from tests.training import tiny_run

STEPS, EVERY = tiny_run.STEPS, tiny_run.EVERY


# The lines of metrics.jsonl begin with one of hyper-parameters, so line k + 1
# belongs to step k: N kills in the middle of a step of any number.
def in_step(k):
  return f"metrics_half:{k + 1}"


def jump():
  """A step after which the curriculum has more noise levels."""
  tiny_run.register()
  method = build.build(resolve.resolve(tiny_run.get_config())).method
  levels = [int(method.curriculum(k)["num_scales"]) for k in range(STEPS)]
  jumps = [k for k in range(1, STEPS) if levels[k] != levels[k - 1]]
  return next(k for k in jumps if k % EVERY not in (0, 1, EVERY - 1))


KILLS = {
    "config_written": "config_written",
    "before_save": "before_save",
    "mid_write": "mid_write",
    "mid_second_write": "mid_write:2",
    "after_commit": "after_commit",
    "boundary": in_step(EVERY),
    "curriculum_jump": "jump",
    "before_done": "before_done",
}


def test_every_fault_point_is_killed_at():
  killed = {k.partition(":")[0] for k in KILLS.values()} - {"jump"}
  # That of a rollback is killed at in test_rolling_back.py.
  assert killed == set(fault_injection.POINTS) - {"before_rollback"}


def released(workdir):
  """Nobody owns the lock, and one claim is left."""
  (claim,) = (workdir / "lock").iterdir()
  return json.loads(claim.read_text()).get("released")


@pytest.fixture(scope="module")
def killed(server, once, tmp_path_factory):
  """Name -> run that was killed and started again."""

  def broken(name):
    workdir = tmp_path_factory.mktemp(name)
    fault = in_step(jump()) if KILLS[name] == "jump" else KILLS[name]
    server.start(workdir, TRAINING_FAULT=fault).wait(
      fault_injection.EXIT_KILLED
    )
    assert not (workdir / "DONE").exists()
    server.start(workdir).wait(0)
    return workdir

  return once(broken, KILLS)


@pytest.mark.parametrize("name", [
    name if name == "mid_second_write"
    else pytest.param(name, marks=pytest.mark.slow) for name in KILLS
])
def test_a_killed_run_resumes_bit_for_bit(killed, unbroken, name):
  workdir = killed[name].result()
  starts.assert_same_run(workdir, unbroken, STEPS)
  assert (workdir / "DONE").exists()
  assert released(workdir)
  kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert kept == [EVERY, 2 * EVERY, STEPS]  # No half of a save is left.


@pytest.mark.slow
def test_kills_at_any_moment_cost_nothing_but_time(server, unbroken, tmp_path):
  seeded = random.Random(0)
  killed = 0
  while not (tmp_path / "DONE").exists():
    start = server.start(tmp_path, code=starts.slow())
    if killed < 3:
      start.until("step ")
      time.sleep(seeded.uniform(0.0, 0.8))
      start.send(signal.SIGKILL)
    # Near its end a run may be quicker.
    killed += start.wait() == -signal.SIGKILL
  assert killed > 1
  starts.assert_same_run(tmp_path, unbroken, STEPS)
  assert goodput.total(str(tmp_path))["starts"] == killed + 1


# The process sends itself the notice when a step is done.
TOLD = """
import os, signal
from bcm_jax.training import metric_logger
report = metric_logger.MetricLogger.__call__
def told(self, step, count, metrics):
  report(self, step, count, metrics)
  if step == STEP:
    os.kill(os.getpid(), signal.SIGTERM)
metric_logger.MetricLogger.__call__ = told
"""


@pytest.mark.parametrize(
  "step", [EVERY + 1, pytest.param(STEPS, marks=pytest.mark.slow)]
)
def test_a_notice_saves_the_step_and_the_next_start_goes_on(
  server, unbroken, tmp_path, step
):
  start = server.start(tmp_path, code=TOLD.replace("STEP", str(step)))
  start.wait(errors.EXIT_PREEMPTED)
  assert f"preempted: step {step} of {STEPS} is saved in" in start.text
  assert starts.leaves(tmp_path, step)
  assert not (tmp_path / "DONE").exists()
  start = server.start(tmp_path)
  start.wait(0)
  assert f"steps {step} to {STEPS}" in start.text or step == STEPS
  starts.assert_same_run(tmp_path, unbroken, STEPS)
  assert (tmp_path / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_create", "_train_step"])
def test_a_notice_before_the_first_step_ends_at_once(server, tmp_path, where):
  code = """
import os, signal, time
from bcm_jax import train
def create(self, *args):
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
  raise AssertionError("not told")
train.Run.WHERE = create
"""
  start = server.start(tmp_path, code=code.replace("WHERE", where))
  start.wait(errors.EXIT_PREEMPTED, 30)
  assert start.text.count("preempted: nothing to save") == 1
  assert released(tmp_path)


def test_ctrl_c_saves_as_a_notice_does(server, unbroken, tmp_path):
  code = TOLD.replace("STEP", "5").replace("SIGTERM", "SIGINT")
  start = server.start(tmp_path, code=code)
  start.wait(errors.EXIT_PREEMPTED)
  assert f"preempted: step 5 of {STEPS} is saved in" in start.text
  assert "Traceback" not in start.text and released(tmp_path)
  server.start(tmp_path).wait(0)
  starts.assert_same_run(tmp_path, unbroken, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_create", "_train_step"])
def test_ctrl_c_with_nothing_to_save_ends_in_one_line(server, tmp_path, where):
  code = """
import os, signal, time
from bcm_jax import train
def create(self, *args):
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(60)
train.Run.WHERE = create
"""
  start = server.start(tmp_path, code=code.replace("WHERE", where))
  start.wait(errors.EXIT_INTERRUPTED, 30)
  assert start.text.count("interrupted") == 1
  assert "Traceback" not in start.text and released(tmp_path)


@pytest.mark.slow
def test_several_steps_a_call_resume_too(server, tmp_path):
  several = "parallel.substeps=2"
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  a = server.start(whole, several)
  b = server.start(broken, several, code=TOLD.replace("STEP", "6"))
  b.wait(errors.EXIT_PREEMPTED)
  assert f"preempted: step 6 of {STEPS} is saved" in b.text
  server.start(broken, several, TRAINING_FAULT=in_step(2)).wait(
    fault_injection.EXIT_KILLED
  )
  server.start(broken, several).wait(0)
  a.wait(0)
  starts.assert_same_run(broken, whole, STEPS)


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(
  server, unbroken, tmp_path
):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  flip_a_bit(tmp_path / "checkpoints" / str(STEPS))
  start = server.start(tmp_path)
  start.wait(0)
  assert f"step {STEPS} is set aside (damaged: state: digest of" in start.text
  assert "falling back to step 8" in start.text
  assert (tmp_path / "damaged" / f"{STEPS}-0").is_dir()
  starts.assert_same_run(tmp_path, unbroken, STEPS)


def flip_a_bit(folder):
  """Of the largest file, in the middle."""
  files = [p for p in folder.rglob("*") if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.slow
def test_no_good_checkpoint_is_refused(server, unbroken, tmp_path):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  for folder in (tmp_path / "checkpoints").iterdir():
    flip_a_bit(folder)
  for _ in range(2):
    start = server.start(tmp_path)
    start.wait(errors.EXIT_BAD_INPUT)
    assert "got damaged checkpoints" in start.text
    assert not (tmp_path / "damaged").exists()


@pytest.mark.slow
def test_config_drift_is_refused_with_a_difference(server, tmp_path):
  server.start(tmp_path, TRAINING_FAULT=in_step(6)).wait(
    fault_injection.EXIT_KILLED
  )
  before = (tmp_path / "config.json").read_text()
  start = server.start(
    tmp_path, "optimizer.learning_rate=0.5", "model.width=16", "seed=3"
  )
  start.wait(errors.EXIT_BAD_INPUT)
  for said in (
    "optimizer.learning_rate is 0.01 there, 0.5 here",
    "model.width is 32 there, 16 here",
    "seed is 0 there, 3 here",
  ):
    assert said in start.text
  assert (tmp_path / "config.json").read_text() == before


def edit(workdir):
  """Another learning rate and seed in config.json."""
  path = workdir / "config.json"
  content = json.loads(path.read_text())
  content["optimizer"]["learning_rate"], content["seed"] = 0.5, 7
  path.write_text(json.dumps(content))


def replace_checkpoints(workdir):
  """Those of a run of seed 7 at a learning rate of 0.5."""
  for path in workdir.glob("checkpoints/*/meta/metadata"):
    record = json.loads(path.read_text())
    config = record["meta"]["config"]
    config["optimizer"]["learning_rate"], config["seed"] = 0.5, 7
    del record["sha256"]
    path.write_text(
        json.dumps({**record, "sha256": hashing.json_digest(record)})
    )


OTHER = ("optimizer.learning_rate=0.5", "seed=7")
# What happened to a run -> flags of a start that is refused.
CHANGES = {
    "edited": (edit, OTHER),
    "lost": (lambda workdir: (workdir / "config.json").unlink(), OTHER),
    "emptied": (
        lambda workdir: (workdir / "config.json").write_text("{}"), OTHER
    ),
    "foreign_checkpoints": (replace_checkpoints, ()),
    "foreign_run": (
        lambda workdir: (edit(workdir), replace_checkpoints(workdir)), ()
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_the_config_in_the_checkpoint_counts(server, unbroken, tmp_path, name):
  shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
  change, flags = CHANGES[name]
  change(tmp_path)
  config = tmp_path / "config.json"
  before = config.read_text() if config.exists() else None
  start = server.start(tmp_path, *flags)
  start.wait(errors.EXIT_BAD_INPUT)
  if name == "emptied":
    assert f"{config}: got a damaged file" in start.text
  else:
    assert "optimizer.learning_rate is 0." in start.text
    assert "seed is " in start.text
  assert "Traceback" not in start.text
  # Nothing is written, and the run's own config goes on.
  assert (config.read_text() if config.exists() else None) == before
  if name == "emptied":
    config.unlink()
  own = OTHER if name.startswith("foreign") else ()
  server.start(tmp_path, *own).wait(0)
  if not own:
    starts.assert_same_run(tmp_path, unbroken, STEPS)
    assert config.read_text() == (unbroken / "config.json").read_text()


@pytest.mark.slow
def test_settings_of_logs_and_saves_change_no_bit(server, unbroken, tmp_path):
  early = """
from bcm_jax.training import hooks
profile = hooks.profile
hooks.profile = lambda folder, first_profile: profile(folder, 2, 2)
"""
  server.start(
    tmp_path,
    "log.every_steps=5",
    "log.profile=true",
    "log.progress_secs=0.0",
    "checkpoint.every_steps=5",
    "eval.seeds=1,2",
    "sample.num_samples=7",
    code=early + TOLD.replace("STEP", "7"),
  ).wait(errors.EXIT_PREEMPTED)
  server.start(
    tmp_path,
    "log.every_steps=3",
    "checkpoint.every_steps=7",
    "checkpoint.keep=1",
    "eval.samplers=onestep",
  ).wait(0)
  assert starts.leaves(tmp_path, STEPS) == starts.leaves(unbroken, STEPS)
  lines = {line.get("step"): line for line in starts.metrics(unbroken)}
  logged = [line for line in starts.metrics(tmp_path) if "loss" in line]
  assert [line["step"] for line in logged] == [5, 9, 12]
  assert all(line == lines[line["step"]] for line in logged)
  assert list((tmp_path / "plugins").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_where_the_time_went_adds_up(server, tmp_path):
  """The parts to the wall time, and that to the clock of who waits for it."""
  began = time.time()
  server.start(tmp_path, TRAINING_FAULT=in_step(10), code=starts.slow()).wait(
    fault_injection.EXIT_KILLED
  )
  server.start(tmp_path, code=starts.slow()).wait(0)
  whole = time.time() - began
  records = [
    json.loads(path.read_text())
    for path in sorted((tmp_path / goodput.FOLDER).iterdir())
  ]
  for record in records:
    assert sum(record["seconds"].values()) == pytest.approx(record["wall"])
    assert all(seconds >= 0 for seconds in record["seconds"].values())
  assert [r["last"] for r in records] == [2 * EVERY, STEPS]
  # Where the save of step 8 was not there yet, the one before it.
  first = records[1]["first"]
  assert first in (EVERY, 2 * EVERY)
  # What a step takes at least is known: it sleeps.
  assert records[1]["seconds"]["step"] > 0.09 * (STEPS - first)
  total = goodput.total(str(tmp_path))
  assert total["wall"] < whole
  # All but starting Python, and what followed the last account of the first.
  assert total["wall"] > 0.5 * whole
  assert 0 < total["goodput"] < 1
  assert total["repeated_steps"] == 2 * EVERY - first
