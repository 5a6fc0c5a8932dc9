"""Where the time went: nothing is counted twice, nothing is left out."""

import json
import time

import pytest

from bcm_jax.training import goodput


class Clock:
  """Seconds that pass when they are told to."""

  now = 100.0

  def __call__(self):
    return self.now

  def pass_(self, seconds):
    self.now += seconds


def account(folder):
  clock = Clock()
  accounts = goodput.Goodput(folder, clock(), clock)
  return accounts, clock


def test_every_second_is_booked_once(tmp_path):
  clock = Clock()
  began = clock()
  clock.pass_(3)
  accounts = goodput.Goodput(str(tmp_path), began, clock)
  with accounts.part("init"):
    clock.pass_(2)
  accounts.begin(0)
  for step in range(1, 5):
    with accounts.part("data"):
      clock.pass_(1)
    clock.pass_(10)  # The step.
    accounts.progress(step)
  with accounts.part("checkpoint"):
    clock.pass_(4)
    with accounts.part("compile"):  # Inside of another: that one's.
      clock.pass_(2)
  with accounts.part("eval"):
    clock.pass_(5)
  record = accounts.record()
  assert record["wall"] == 60
  assert record["seconds"] == {
      "init": 5, "compile": 0, "data": 4, "checkpoint": 6, "rollback": 0,
      "eval": 5, "step": 40,
  }
  assert (record["first"], record["last"], record["steps"]) == (0, 4, 4)


def test_an_account_inside_of_a_part_knows_it(tmp_path):
  accounts, clock = account(str(tmp_path))
  accounts.begin(0)
  with accounts.part("checkpoint"):
    clock.pass_(7)
    accounts.save(5, 0)
    clock.pass_(1)
  written = json.loads((tmp_path / "goodput" / "0000.json").read_text())
  assert written["seconds"]["checkpoint"] == 7
  assert written["seconds"]["step"] == 0 and written["saved"] == 0
  assert accounts.record()["seconds"]["checkpoint"] == 8


def test_a_part_that_fails_is_booked(tmp_path):
  accounts, clock = account(str(tmp_path))
  with pytest.raises(KeyError), accounts.part("data"):
    clock.pass_(2)
    raise KeyError
  with accounts.part("checkpoint"):
    clock.pass_(3)
  seconds = accounts.record()["seconds"]
  assert (seconds["data"], seconds["checkpoint"]) == (2, 3)


def start(folder, first, last, saved=None):
  """One start whose steps take a second; `saved` None ends in a kill."""
  accounts, clock = account(str(folder))
  with accounts.part("init"):
    clock.pass_(5)
  accounts.begin(first)
  for step in range(first + 1, last + 1):
    clock.pass_(1)
    accounts.progress(step)
  if saved is not None:
    accounts.save(last, saved)


def test_several_starts_and_steps_that_were_lost(tmp_path):
  start(tmp_path, 0, 20, saved=20)
  # Killed after step 37, of which the account of step 30 tells, 25 was saved:
  # an account is written where 10 seconds have passed.
  start(tmp_path, 20, 37)
  start(tmp_path, 25, 40, saved=40)
  total = goodput.total(str(tmp_path))
  assert total["starts"] == 3
  # 10 seconds of steps are known of the second start, and its 5 of 'init' were
  # before the account of its beginning.
  assert total["seconds"]["step"] == 20 + 10 + 15
  assert total["seconds"]["init"] == 15
  assert total["wall"] == sum(total["seconds"].values()) == 60
  assert total["repeated_steps"] == 5
  assert total["goodput"] == pytest.approx(45 * (1 - 5 / 45) / 60)


def test_a_start_that_did_more_than_its_account_says(tmp_path):
  start(tmp_path, 0, 5)  # Killed; nothing but its beginning is written.
  start(tmp_path, 4, 10, saved=10)
  total = goodput.total(str(tmp_path))
  assert total["repeated_steps"] == 0 and 0 < total["goodput"] < 1


def test_steps_before_a_roll_back_are_lost(tmp_path):
  accounts, clock = account(str(tmp_path))
  accounts.begin(0)
  for _ in range(10):
    clock.pass_(1)
  accounts.progress(10)
  with accounts.part("rollback"):
    clock.pass_(2)
  accounts.begin(4)
  for _ in range(6):
    clock.pass_(1)
  accounts.save(10, 10)
  total = goodput.total(str(tmp_path))
  assert total["repeated_steps"] == 6
  assert total["goodput"] == pytest.approx(16 * (10 / 16) / 18)


def test_the_real_clock_adds_up(tmp_path):
  began = time.monotonic()
  accounts = goodput.Goodput(str(tmp_path), began)
  for name in goodput.PARTS:
    with accounts.part(name):
      time.sleep(0.02)
    time.sleep(0.01)
  wall = time.monotonic() - began
  record = accounts.record()
  assert record["wall"] == pytest.approx(wall, rel=0.01)
  assert sum(record["seconds"].values()) == pytest.approx(wall, rel=0.01)
  assert record["seconds"]["step"] == pytest.approx(
      wall - sum(record["seconds"][p] for p in goodput.PARTS), abs=0.01
  )


def test_half_an_account_and_a_full_disk_are_no_trouble(
    tmp_path, monkeypatch
):
  assert goodput.total(str(tmp_path)) is None
  start(tmp_path, 0, 4, saved=4)
  (tmp_path / "goodput" / "0001.json").write_text('{"first":')
  assert goodput.total(str(tmp_path))["starts"] == 1

  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(goodput.files, "write_json", full)
  start(tmp_path, 4, 8, saved=8)


@pytest.mark.parametrize("text", [
    "", "[]", "null", "[" * 100_000, "{}", '{"first": 0, "seconds": []}',
    '{"first": 0, "last": 1e999, "steps": 1, "wall": 1, "seconds": {}}',
    '{"first": "0", "last": 1, "steps": 1, "wall": NaN, "seconds": {"step": 1}}'
])
def test_damaged_records_are_left_out_and_named(tmp_path, caplog, text):
  accounts, clock = account(str(tmp_path))
  accounts.begin(0)
  clock.pass_(5)
  accounts.save(4, 4)
  good = goodput.total(str(tmp_path))
  (tmp_path / goodput.FOLDER / "0001.json").write_text(text)
  (tmp_path / goodput.FOLDER / "0002.json").mkdir()
  assert goodput.total(str(tmp_path)) == good
  assert "0001.json" in caplog.text and "0002.json" in caplog.text
