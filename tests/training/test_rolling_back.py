"""Steps that are not finite: skipped, rolled back, given up; nothing hides.

Every start is a process of the real command (starts.py).
"""

import json

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.training import fault_injection
from tests.training import starts
from tests.training import tiny_run
from tests.training.test_resuming import TOLD

STEPS, EVERY = tiny_run.STEPS, tiny_run.EVERY
# Two bad steps in a row are too many.
TWO = "training.max_consecutive_nonfinite=2"
# Batches at the positions BAD hold one image with one pixel that is NaN.
POISON = """
import numpy as np
from bcm_jax import train
batches = train.batches
def poisoned(experiment, source):
  read = batches(experiment, source)
  def one(position):
    batch = read(position)
    batch["image"] = batch["image"].astype(np.float32) / 127.5 - 1
    if position in BAD:
      batch["image"][-1, 0, 0, 0] = np.nan
    return batch
  return one
train.batches = poisoned
"""


def poison(*positions):
  return POISON.replace("BAD", str(positions))


def state(workdir, step=STEPS):
  """Step, offset, skipped and updates of a checkpoint, and all it holds."""
  from bcm_jax.checkpoint import checkpoint

  saved = checkpoint.Checkpoints(workdir / "checkpoints")
  _, tree, _ = saved.read_raw(step)
  return tree


def numbers(workdir, step=STEPS):
  tree = state(workdir, step)
  return [int(x) for x in (
      tree["step"], tree["data_offset"], tree["skipped"],
      tree["networks"]["student"]["num_updates"],
  )]


def all_finite(node):
  if isinstance(node, dict):
    return all(map(all_finite, node.values()))
  return node is None or bool(np.isfinite(np.asarray(node)).all())


@pytest.mark.slow
def test_one_bad_step_is_skipped_and_leaves_no_trace(server, tmp_path):
  server.start(
      tmp_path, TWO, "checkpoint.every_steps=1", code=poison(5)
  ).wait(0)
  assert numbers(tmp_path) == [STEPS, 0, 1, STEPS - 1]
  before, after = (
      {tuple(x["path"]): x.get("sha256") for x in starts.leaves(tmp_path, k)}
      for k in (5, 6)
  )
  changed = {path for path in before if before[path] != after[path]}
  assert changed == {("step",), ("skipped",), ("skipped_in_row",)}
  assert all_finite(state(tmp_path))
  bad = [x for x in starts.metrics(tmp_path) if x.get("loss") == "NaN"]
  assert [x["step"] for x in bad] == [6]


# Name -> (bad positions, (window, skipped) of the last step, what is damaged).
RUNS = {
    # Steps 6 and 7 are bad: from step 4 with position 7.
    "once": ((5, 6), (3, 0), []),
    # Position 7 and 8 are bad too, and 4 is all that there is.
    "twice": ((5, 6, 7, 8), (5, 0), []),
    # Steps 10 and 11 are bad, from step 8 the positions 11 and 12 again: back
    # to step 4.
    "older": ((9, 10, 11, 12), (9, 0), ["8-0"]),
    # Before the first save: the state before the first step.
    "early": ((1, 2), (3, 0), []),
    # The bad steps end where a save is due.
    "at_save": ((6, 7), (4, 0), []),
}
ROLL_BACKS = {"once": 1, "twice": 2, "older": 2, "early": 1, "at_save": 1}


@pytest.fixture(scope="module")
def whole(server, once, tmp_path_factory):
  """Name -> (run of one start, what it printed)."""

  def run(name):
    workdir = tmp_path_factory.mktemp(name)
    start = server.start(workdir, TWO, code=poison(*RUNS[name][0]))
    start.wait(0)
    return workdir, start.text

  return once(run, RUNS)


@pytest.mark.parametrize("name", [
    name if name == "once" else pytest.param(name, marks=pytest.mark.slow)
    for name in RUNS
])
def test_a_roll_back_goes_on_with_other_data(whole, name):
  workdir, text = whole[name].result()
  _, (window, skipped), damaged = RUNS[name]
  assert numbers(workdir) == [STEPS, window, skipped, STEPS]
  assert text.count("2 steps in a row were not finite") == ROLL_BACKS[name]
  assert f"(rollback {ROLL_BACKS[name]} of 3)" in text
  assert all_finite(state(workdir))
  lines = [x for x in starts.metrics(workdir) if "loss" in x]
  assert [x["step"] for x in lines] == list(range(1, STEPS + 1))
  assert all(x["loss"] != "NaN" for x in lines)
  kept = workdir / "damaged"
  assert sorted(p.name for p in kept.iterdir() if kept.exists()) == damaged if (
      damaged
  ) else not kept.exists()


# Sets a fault point when a rollback is written down, the COUNT-th in a row.
ARMED = """
import os
from bcm_jax.training import fault_injection
from bcm_jax.training import nonfinite
add = nonfinite.add_rollback
def armed(workdir, rollback):
  add(workdir, rollback)
  if rollback.count == COUNT:
    os.environ[fault_injection.ENVIRONMENT] = "POINT"
nonfinite.add_rollback = armed
"""
# Name -> (which of RUNS, deaths of the starts before the last: the rollback
# after which, and the fault point).
BROKEN = {
    "after_second": ("older", [(2, "metrics_half")]),
    "each": ("twice", [(0, "before_rollback"), (0, "before_rollback:2"),
                       (2, "metrics_half:2")]),
    "save": ("at_save", [(0, "before_rollback"), (1, "before_save")]),
    "early": ("early", [(0, "before_rollback"), (1, "metrics_half:3")]),
}


@pytest.fixture(scope="module")
def broken(server, once, tmp_path_factory):
  """Name -> run that was killed around its rollbacks."""

  def run(name):
    workdir = tmp_path_factory.mktemp(name)
    which, deaths = BROKEN[name]
    code = poison(*RUNS[which][0])
    for count, fault in deaths:
      armed = ARMED.replace("COUNT", str(count)).replace("POINT", fault)
      server.start(
          workdir, TWO, code=code + (armed if count else ""),
          TRAINING_FAULT="" if count else fault,
      ).wait(fault_injection.EXIT_KILLED)
    start = server.start(workdir, TWO, code=code)
    start.wait(0)
    return workdir, start.text

  return once(run, BROKEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_roll_back_that_is_killed_resumes_bit_for_bit(whole, broken, name):
  expected, _ = whole[BROKEN[name][0]].result()
  workdir, text = broken[name].result()
  starts.assert_same_run(workdir, expected, STEPS)
  # What was rolled back is not tried again.
  assert ("were not finite" in text) == name.startswith("before")


# Step 10 and 11 are bad whatever the data, as where the training diverges.
DIVERGE = """
import numpy as np
from bcm_jax import train
batches, stream, bad = train.batches, train.stream, []
def by_step(experiment, source, backend, calls, window):
  bad[:] = [window + 9, window + 10]
  return stream(experiment, source, backend, calls, window)
train.stream = by_step
""" + POISON.partition("batches = train.batches")[2].replace("BAD", "bad")


@pytest.mark.slow
def test_a_run_that_fails_at_the_same_step_for_ever_stops(server, tmp_path):
  """Though it comes as far as a new checkpoint every time."""
  start = server.start(tmp_path, TWO, code=DIVERGE)
  start.wait(errors.EXIT_BAD_INPUT)
  back = [line.partition("continuing from ")[2] for line in
          start.text.splitlines() if "continuing from" in line]
  assert back == [
      f"step {step} with other data (rollback {i} of 3)"
      for i, step in enumerate((8, 4, 4), start=1)
  ]
  assert "error: step 11" in start.text
  assert "3 rollbacks did not help" in start.text
  # Started again, it has no more tries than before.
  again = server.start(tmp_path, TWO, code=DIVERGE)
  again.wait(errors.EXIT_BAD_INPUT)
  assert "continuing from" not in again.text


# The first update is finite, and all that follows is not.
DIVERGED = "optimizer.learning_rate=1e30"
FEW = ("training.max_consecutive_nonfinite=5", "training.num_steps=40")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ("checkpoint.every_steps=2", *FEW),
    ("checkpoint.every_steps=1", "parallel.substeps=2", *FEW),
    # It would end before there are too many in a row.
    ("training.num_steps=8",),
])
def test_a_run_that_diverges_never_ends_as_done(server, tmp_path, flags):
  start = server.start(tmp_path, DIVERGED, *flags)
  start.wait(errors.EXIT_BAD_INPUT)
  assert "(rollback 3 of 3)" in start.text
  assert "3 rollbacks did not help" in start.text
  assert not (tmp_path / "DONE").exists()
  assert list((tmp_path / "diagnostics").glob("step-*/report.json"))
  for folder in tmp_path.glob("checkpoints/*"):
    assert all_finite(state(tmp_path, int(folder.name)))


@pytest.mark.slow
def test_saves_within_a_streak_and_a_notice_count_as_no_progress(
    server, tmp_path
):
  flags = (DIVERGED, "checkpoint.every_steps=2", *FEW)
  back = 0
  for step in (3, 5, 99):
    start = server.start(
        tmp_path, *flags, code=TOLD.replace("STEP", str(step))
    )
    start.wait(errors.EXIT_BAD_INPUT if step == 99 else errors.EXIT_PREEMPTED)
    back += start.text.count("continuing from")
  assert back == 3 and "3 rollbacks did not help" in start.text


@pytest.mark.slow
def test_what_does_not_get_better_stops_with_a_bundle(server, tmp_path):
  code = poison(*range(5, 99))
  start = server.start(tmp_path, TWO, "training.max_rollbacks=2", code=code)
  start.wait(errors.EXIT_BAD_INPUT)
  (line,) = [x for x in start.text.splitlines() if x.startswith("error: ")]
  assert "step 6: 2 steps in a row were not finite" in line
  assert "2 rollbacks did not help" in line
  # From step 4 with positions 4, 7, 9: the first try had one good step.
  folder = tmp_path / "diagnostics" / "step-6"
  assert str(folder) in line
  report = json.loads((folder / "report.json").read_text())
  assert report["position"] == 10 and report["rollbacks"] == 2
  assert report["metrics"]["skipped_in_row"] == "2.0"
  assert report["metrics"]["loss"] == "nan"
  assert all(x["not_finite"] == 0 for x in report["tensors"].values())
  with np.load(folder / "batch.npz") as batch:
    assert np.isnan(batch["image"]).sum() == 1
    assert np.isnan(batch["image"][-1, 0, 0, 0])
    assert len(batch["index"]) == 16
  # A launcher that starts it again learns the same.
  server.start(tmp_path, TWO, "training.max_rollbacks=2", code=code).wait(
      errors.EXIT_BAD_INPUT
  )
  assert all_finite(state(tmp_path, EVERY))
