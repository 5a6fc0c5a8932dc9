"""Saves may fail for a while; the run goes on, and says so, within bounds."""

import logging
import resource

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint

# Orbax leaves a coroutine behind when a write fails.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")


def state(value):
  """Too large for the disk that is full, below."""
  return {"x": np.random.default_rng(value).normal(size=8_000)}


class Full:
  """A disk that takes no file of more than 10,000 bytes, while it is full.

  A limit of the process's own: what is written through native code meets it
  as it would a full disk.
  """

  def __init__(self):
    self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def __enter__(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, self.before[1]))

  def __exit__(self, *exc_info):
    resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def messages(caplog):
  """Ours; Orbax tells every failure with its stack besides."""
  return [
      r.getMessage() for r in caplog.records
      if r.levelno == logging.ERROR and "could not be written" in r.getMessage()
  ]


@pytest.fixture
def make(tmp_path):
  """Makes savers of one folder, and closes them in any case."""
  made = []

  def make(**kwargs):
    made.append(checkpoint.CheckpointSaver(
        checkpoint.Checkpoints(tmp_path / "c", keep=None), {"fact": 1},
        wait_secs=7.0, **kwargs,
    ))
    return made[-1]

  yield make
  for each in made:
    each.saved.close()


def test_saves_are_there_with_their_facts(make):
  mine = make()
  assert mine.steps() == [] and mine.newest is None
  mine.save(4, state(4))
  mine.save(8, state(8))
  assert mine.newest == 4  # 8 is being written.
  assert mine.steps() == [4, 8] and mine.newest == 8
  mine.finish(12, state(12))
  assert mine.newest == 12
  step, tree, meta = checkpoint.Checkpoints(mine.saved.directory).read_raw()
  assert (step, meta) == (12, {"fact": 1})
  np.testing.assert_array_equal(tree["x"], state(12)["x"])


def test_a_failure_is_logged_and_forgotten_after_a_success(make, caplog):
  mine = make()
  for step in (1, 2, 3):
    mine.save(10 * step, state(0))  # Nothing under way.
    mine.steps()
    with Full():
      mine.save(10 * step + 1, state(step))
      mine.steps()
    assert mine.failures == 1 and mine.newest == 10 * step
  said = messages(caplog)
  assert len(said) == 3
  for line in said:
    assert str(mine.saved.directory) in line and "failure 1 of 3" in line
    assert "File too large" in line and "\n" not in line
  mine.save(99, state(0))
  assert mine.steps() == [10, 20, 30, 99] and mine.failures == 0


def test_too_many_failures_in_a_row_end_the_run(make):
  mine = make(max_failures=2)
  mine.finish(1, state(1))
  with Full():
    mine.save(2, state(2))
    mine.save(3, state(3))
    assert mine.failures == 1
    with pytest.raises(errors.MachineError) as error:
      mine.save(4, state(4))
  assert "got 2 consecutive failures" in str(error.value)
  assert "restart from step 1" in str(error.value)
  assert "\n" not in str(error.value)


def test_the_last_save_is_tried_again_until_there_is_room(make):
  full, slept = Full(), []

  def sleep(seconds):
    slept.append(seconds)
    full.__exit__()  # Somebody made room.

  mine = make(sleep=sleep)
  with full:
    mine.finish(5, state(5))
  assert slept == [7.0] and mine.newest == 5 and mine.failures == 0


def test_the_last_save_gives_up_in_the_end(make):
  slept = []
  mine = make(sleep=slept.append)
  with Full(), pytest.raises(errors.MachineError):
    mine.finish(5, state(5))
  assert slept == [7.0, 7.0]


def test_finishing_waits_for_what_is_there_already(make):
  mine = make()
  mine.save(5, state(5))
  mine.finish(5, state(5))
  assert mine.newest == 5 and mine.steps() == [5]


def test_a_mistake_in_the_state_is_no_failure_of_the_disk(make):
  mine = make()
  with pytest.raises(TypeError, match="expected an array"):
    mine.save(1, {"x": "text"})
  assert mine.failures == 0


def test_a_failure_on_another_host_counts_here(make, monkeypatch, caplog):
  mine = make()
  monkeypatch.setattr(checkpoint.multihost, "all_agree", lambda ok: False)
  mine.save(1, state(1))
  assert mine.failures == 2  # The wait, and the save.
  assert "on another host" in messages(caplog)[0]
