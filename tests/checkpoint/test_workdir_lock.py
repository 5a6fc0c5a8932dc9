"""One writer a folder: refused while another beats, taken over when it is dead.
"""

import collections
import errno
import json
import logging
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from bcm_jax.checkpoint import workdir_lock
from bcm_jax.errors import UserError

BEAT = 0.05


def claims(folder):
  """Names of the claims, in order."""
  return sorted(p.name for p in (folder / workdir_lock.FOLDER).iterdir())


def newest(folder):
  return folder / workdir_lock.FOLDER / claims(folder)[-1]


def read(folder):
  return json.loads(newest(folder).read_text())


def write(folder, legacy=False, **changes):
  """An owner's claim, of a process that is alive unless said otherwise."""
  owner = workdir_lock.WorkdirLock(folder)._me | {"beats": 0} | changes
  path = folder / "lock.json"
  if not legacy:
    path = folder / workdir_lock.FOLDER / "000007.json"
    path.parent.mkdir()
  path.write_text(json.dumps(owner))
  return path


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
  assert claims(tmp_path) == ["000001.json"] and read(tmp_path)["released"]
  mine.release()  # A second time does nothing.


def test_numbers_never_decrease_and_old_claims_go(tmp_path):
  for number in range(1, 4):
    with workdir_lock.WorkdirLock(tmp_path, sleep=never):
      assert claims(tmp_path) == [f"{number:06d}.json"]


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


def start_at_once(folder, barrier, results):
  """A start: acquires the lock when all are ready, then is killed with it."""

  def alive(seconds):
    raise UserError("waits for a process that may be alive")

  logging.disable(logging.WARNING)
  mine = workdir_lock.WorkdirLock(folder, 15.0, alive)
  barrier.wait()
  try:
    mine.acquire()
    results.put("owner" if mine.look() else "lost")
  except UserError:
    results.put("refused")
  except BaseException as e:
    results.put(repr(e))
  barrier.wait()  # All have tried: nobody owned what a later one got.
  if mine.look() and mine._thread:
    results.put("owner in the end")
  barrier.wait()
  os.kill(os.getpid(), signal.SIGKILL)


def kill_and_start(folder, rounds, starts=3):
  """Kills all starts of a round; some rounds begin with an older lock."""
  fork = multiprocessing.get_context("fork")
  for number in range(rounds):
    if number % 10 == 0:
      shutil.rmtree(folder)
      folder.mkdir()
      write(folder, legacy=number % 20 == 0, pid=2**22 + 5)
    barrier, results = fork.Barrier(starts), fork.SimpleQueue()
    processes = [
        fork.Process(target=start_at_once, args=(folder, barrier, results))
        for _ in range(starts)
    ]
    for process in processes:
      process.start()
    for process in processes:
      process.join(30)
      assert process.exitcode == -signal.SIGKILL
    found = collections.Counter()
    while not results.empty():
      found[results.get()] += 1
    assert found == {
        "owner": 1, "refused": starts - 1, "owner in the end": 1
    }, number
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize("rounds", [
    10, pytest.param(200, marks=pytest.mark.slow)
])
def test_after_a_kill_several_starts_at_once_never_own_it_both(
    tmp_path, rounds
):
  # A process without JAX, whose threads a fork would miss.
  code = (
      "import pathlib; from tests.checkpoint import test_workdir_lock as t; "
      f"t.kill_and_start(pathlib.Path({str(tmp_path / 'run')!r}), {rounds})"
  )
  (tmp_path / "run").mkdir()
  root = pathlib.Path(__file__).parents[2]
  subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("changes", [
    dict(pid=None), dict(started="1"),  # The number was given away again.
])
def test_a_dead_process_of_this_machine_is_not_waited_for(
    tmp_path, changes, legacy
):
  if changes.get("pid", 0) is None:
    changes = dict(pid=dead_process())
  write(tmp_path, legacy, **changes)
  with workdir_lock.WorkdirLock(tmp_path, BEAT, never):
    assert read(tmp_path)["pid"] == os.getpid()
    assert claims(tmp_path) == ["000001.json" if legacy else "000008.json"]
    assert not (tmp_path / "lock.json").exists()


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


@pytest.mark.parametrize("legacy", [False, True])
def test_an_owner_that_beats_at_last_is_respected(tmp_path, legacy):
  path = write(tmp_path, legacy, machine="another")
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    if len(slept) == 11:
      path.write_text(json.dumps(json.loads(path.read_text()) | {"beats": 7}))

  with pytest.raises(UserError, match="--workdir"):
    workdir_lock.WorkdirLock(tmp_path, 15.0, sleep).acquire()
  assert len(slept) == 11
  assert json.loads(path.read_text())["beats"] == 7
  assert len(claims(tmp_path)) == (0 if legacy else 1)


@pytest.mark.parametrize("released", [False, True])
def test_an_owner_that_leaves_is_not_waited_for_any_longer(tmp_path, released):
  path = write(tmp_path, machine="another")
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    if released:
      path.write_text('{"released": true}')
    else:
      path.unlink()

  workdir_lock.WorkdirLock(tmp_path, 15.0, sleep).acquire().release()
  assert len(slept) == 1


def test_a_higher_claim_made_meanwhile_is_respected(tmp_path):
  path = write(tmp_path, machine="another")
  higher = path.with_name("000009.json")
  with pytest.raises(UserError, match="process 3 on b"):
    workdir_lock.WorkdirLock(
        tmp_path, 15.0,
        lambda _: higher.write_text('{"token": "t", "pid": 3, "host": "b"}'),
    ).acquire()
  assert claims(tmp_path) == ["000007.json", "000009.json"]


@pytest.mark.parametrize("text", [
    "", '{"token": "12', "[]", "[" * 100_000, '{"pid": [], "machine": 3}',
    "\x00\xff",
])
@pytest.mark.parametrize("legacy", [False, True])
def test_odd_content_is_waited_for_as_a_silent_owner(tmp_path, text, legacy):
  write(tmp_path, legacy).write_text(text)
  slept = []
  with workdir_lock.WorkdirLock(tmp_path, 15.0, slept.append) as mine:
    assert sum(slept) == 45 and mine.look()


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("nowhere"),
])
def test_a_claim_that_is_no_file_is_waited_for(tmp_path, make):
  path = write(tmp_path)
  path.unlink()
  make(path)
  slept = []
  with workdir_lock.WorkdirLock(tmp_path, 15.0, slept.append) as mine:
    assert sum(slept) == 45 and mine.look()


def test_other_names_are_no_claims(tmp_path):
  folder = tmp_path / workdir_lock.FOLDER
  folder.mkdir()
  for name in ("notes", "7.json", "\u0669" * 6 + ".json", "000009.json.x.tmp"):
    (folder / name).write_text("{}")
  with workdir_lock.WorkdirLock(tmp_path, BEAT, never) as mine:
    assert (folder / "000001.json").exists() and mine.look()


@pytest.mark.parametrize("stolen", [True, False])
def test_a_lost_lock_is_noticed_and_not_released(tmp_path, stolen):
  mine = workdir_lock.WorkdirLock(tmp_path, BEAT).acquire()
  if stolen:
    other = newest(tmp_path).with_name("000002.json")
    other.write_text('{"token": "other"}')
  else:  # A user removed it.
    shutil.rmtree(tmp_path / workdir_lock.FOLDER)
  end = time.monotonic() + 10
  while not mine.lost:
    assert time.monotonic() < end
    time.sleep(BEAT / 5)
  assert not mine.look()
  mine.release()
  if stolen:
    assert other.read_text() == '{"token": "other"}'
  else:
    assert not (tmp_path / workdir_lock.FOLDER).exists()


def test_a_look_notices_before_the_next_beat(tmp_path):
  mine = workdir_lock.WorkdirLock(tmp_path, 1e6).acquire()
  newest(tmp_path).with_name("000002.json").write_text("")
  assert not mine.lost
  assert not mine.look() and mine.lost
  mine.release()


def test_a_claim_below_one_made_since_the_listing_is_no_lock(
    tmp_path, monkeypatch
):
  """Another job claimed, released and was followed while this one slept."""
  create = workdir_lock.files.create

  def late(path, content):
    (tmp_path / workdir_lock.FOLDER / "000005.json").write_text("{}")
    create(path, content)

  monkeypatch.setattr(workdir_lock.files, "create", late)
  with pytest.raises(UserError, match="--workdir"):
    workdir_lock.WorkdirLock(tmp_path, BEAT, never).acquire()
  assert claims(tmp_path) == ["000005.json"]


def test_a_full_disk_leaves_no_claim(tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(workdir_lock.files.os, "fsync", full)
  with pytest.raises(OSError, match="No space"):
    workdir_lock.WorkdirLock(tmp_path, BEAT, never).acquire()
  assert claims(tmp_path) == []


def test_a_full_disk_does_not_cost_the_lock(tmp_path, monkeypatch, caplog):
  mine = workdir_lock.WorkdirLock(tmp_path, BEAT).acquire()

  def full(path, content):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(workdir_lock.files, "write_bytes", full)
  end = time.monotonic() + 10
  while "No space left" not in caplog.text:
    assert time.monotonic() < end
    time.sleep(BEAT / 5)
  assert mine.look()
  mine.release()
