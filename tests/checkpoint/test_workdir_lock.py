"""One writer a folder: refused while another beats, taken over when it is dead.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from bcm_jax.checkpoint import workdir_lock
from bcm_jax.errors import UserError

BEAT = 0.05


def read(folder):
  return json.loads((folder / workdir_lock.FILE).read_text())


def write(folder, **changes):
  """An owner's file, of a process that is alive unless said otherwise."""
  with workdir_lock.WorkdirLock(folder):
    owner = read(folder)
  (folder / workdir_lock.FILE).write_text(json.dumps(owner | changes))
  return owner | changes


def dead_process():
  """The number of a process that has ended."""
  child = subprocess.Popen([sys.executable, "-c", ""])
  child.wait()
  return child.pid


def never(seconds):
  raise AssertionError("waited for a process that is known to be dead")


def test_the_owner_is_written_down_and_released(tmp_path):
  with workdir_lock.WorkdirLock(tmp_path, sleep=never) as mine:
    owner = read(tmp_path)
    assert owner["pid"] == os.getpid() and owner["beats"] == 0
    assert not mine.lost and mine.look()
  assert not (tmp_path / workdir_lock.FILE).exists()
  mine.release()  # A second time does nothing.


def test_the_owner_beats(tmp_path):
  with workdir_lock.WorkdirLock(tmp_path, BEAT):
    end = time.monotonic() + 10
    while read(tmp_path)["beats"] < 3:
      assert time.monotonic() < end
      time.sleep(BEAT / 5)


def test_a_second_writer_is_refused_while_the_first_beats(tmp_path):
  with workdir_lock.WorkdirLock(tmp_path, BEAT):
    with pytest.raises(UserError) as error:
      workdir_lock.WorkdirLock(tmp_path, BEAT).acquire()
    assert str(os.getpid()) in str(error.value)
    assert "--workdir" in str(error.value)
    assert read(tmp_path)["pid"] == os.getpid()


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
  barrier, won, refused = threading.Barrier(8), [], []

  def start():
    mine = workdir_lock.WorkdirLock(tmp_path, BEAT)
    barrier.wait()
    try:
      won.append(mine.acquire())
    except UserError:
      refused.append(mine)

  threads = [threading.Thread(target=start) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(won) == 1 and len(refused) == 7
  assert won[0].look()
  won[0].release()


@pytest.mark.parametrize("changes", [
    dict(pid=None), dict(started="1"),  # The number was given away again.
])
def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path, changes):
  if changes.get("pid", 0) is None:
    changes = dict(pid=dead_process())
  write(tmp_path, **changes)
  with workdir_lock.WorkdirLock(tmp_path, BEAT, never):
    assert read(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("changes", [
    dict(machine="another/boot"), dict(machine="another", pid=1),
    dict(),  # This very process: a notebook that lost its lock, say.
])
def test_a_silent_owner_is_taken_over_after_patience(
    tmp_path, caplog, changes
):
  write(tmp_path, **changes)
  slept = []
  with workdir_lock.WorkdirLock(tmp_path, 15.0, slept.append):
    assert read(tmp_path)["beats"] == 0 and sum(slept) == 45
  said = [r.getMessage() for r in caplog.records
          if r.levelno == logging.WARNING]
  assert "waiting 45 s" in said[0] and "taking over" in said[1]


def test_an_owner_that_beats_at_last_is_respected(tmp_path):
  owner = write(tmp_path, machine="another")
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    if len(slept) == 11:
      text = json.dumps(owner | {"beats": 7})
      (tmp_path / workdir_lock.FILE).write_text(text)

  with pytest.raises(UserError, match="--workdir"):
    workdir_lock.WorkdirLock(tmp_path, 15.0, sleep).acquire()
  assert len(slept) == 11 and read(tmp_path)["beats"] == 7


def test_an_owner_that_leaves_is_not_waited_for_any_longer(tmp_path):
  write(tmp_path, machine="another")
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    (tmp_path / workdir_lock.FILE).unlink()

  workdir_lock.WorkdirLock(tmp_path, 15.0, sleep).acquire().release()
  assert len(slept) == 1


def test_half_a_file_is_waited_for_as_a_silent_owner(tmp_path):
  (tmp_path / workdir_lock.FILE).write_text('{"token": "12')
  slept = []
  with workdir_lock.WorkdirLock(tmp_path, 15.0, slept.append) as mine:
    assert sum(slept) == 45 and mine.look()


@pytest.mark.parametrize("stolen", [True, False])
def test_a_lost_lock_is_noticed_and_not_released(tmp_path, stolen):
  mine = workdir_lock.WorkdirLock(tmp_path, BEAT).acquire()
  other = read(tmp_path) | {"token": "other"}
  if stolen:
    (tmp_path / workdir_lock.FILE).write_text(json.dumps(other))
  else:  # The other job has finished meanwhile.
    (tmp_path / workdir_lock.FILE).unlink()
  end = time.monotonic() + 10
  while not mine.lost:
    assert time.monotonic() < end
    time.sleep(BEAT / 5)
  assert not mine.look()
  mine.release()
  assert (tmp_path / workdir_lock.FILE).exists() == stolen
  if stolen:
    assert read(tmp_path) == other


def test_a_look_notices_before_the_next_beat(tmp_path):
  mine = workdir_lock.WorkdirLock(tmp_path, 1e6).acquire()
  (tmp_path / workdir_lock.FILE).write_text('{"token": "other"}')
  assert not mine.lost
  assert not mine.look() and mine.lost
  mine.release()


def test_a_full_disk_does_not_cost_the_lock(tmp_path, monkeypatch, caplog):
  mine = workdir_lock.WorkdirLock(tmp_path, BEAT).acquire()

  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(workdir_lock.files, "write_json", full)
  end = time.monotonic() + 10
  while "No space left" not in caplog.text:
    assert time.monotonic() < end
    time.sleep(BEAT / 5)
  assert mine.look()
  mine.release()
  assert not (tmp_path / workdir_lock.FILE).exists()
