"""The babysitter's commands, and how it sees the cloud and the run."""

import os
import subprocess

import babysit
import pytest

from tests.launch import harness

RUN = ("--", "--config=configs/cifar10.py")


def describe(state, initiator="SERVICE", **more):
  out = f'{{"state": {{"state": "{state}", "stateInitiator": "{initiator}"}}}}'
  return {"to": "queued-resources describe", "out": out, **more}


def objects(*names):
  out = "".join(f"runs/a-run/{name},{17 + i}\n" for i, name in enumerate(names))
  return {"to": "storage objects list", "out": out}


def babysat(checkout, monkeypatch, *args):
  """Runs babysit.main against the stand-ins; time passes by sleeping alone."""
  monkeypatch.setattr(babysit, "LAUNCH", checkout.root / "launch")
  log = checkout.folder / "log"
  log.write_text("")
  for name, value in checkout.env(**harness.SETTINGS).items():
    monkeypatch.setenv(name, value)
  clock = harness.Clock()
  status = babysit.main(
      ["--marks=gs://a-bucket/runs/a-run", "--commit=abc", *args, *RUN],
      clock=clock, sleep=clock.sleep,
  )
  return status, checkout.plain(log.read_text())


@pytest.mark.slow
def test_with_the_real_commands_from_waiting_to_done(checkout, monkeypatch):
  missing = {
      "to": "queued-resources describe", "err": "NOT_FOUND: x", "status": 1,
  }
  marks = {"to": "storage objects list", "err": "URLs matched no objects",
           "status": 1, "times": 11}
  checkout.answer(
      missing | {"times": 1},
      describe("WAITING_FOR_RESOURCES", "USER", times=2),
      describe("ACTIVE", "USER", times=2),
      describe("SUSPENDED", times=2),
      missing | {"times": 3},
      describe("ACTIVE", "USER"),
      marks,
      objects("DONE", "lock/000001.json"),
  )
  status, log = babysat(checkout, monkeypatch, "--poll-secs=60")
  assert status == 0
  changes = [
      line for line in log.splitlines()
      if any(f'"{w}"' in line for w in ("create", "delete"))
  ]
  assert ["delete" in line for line in changes] == [False, True, False]
  assert "startup-script=" in changes[0]


def test_marks_in_a_folder_and_in_a_bucket(checkout, monkeypatch, tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  world = babysit.World(str(folder), ())
  assert world.marks_seen() == (None, False, None)
  for claim in (folder / "lock.json", folder / "lock" / "000001.json"):
    claim.parent.mkdir(exist_ok=True)
    claim.write_text("{}")
    first = world.marks_seen()[0]
    os.utime(claim, ns=(1, 1))
    assert first not in (None, world.marks_seen()[0])
  (folder / "STOPPED").write_text("65\n")
  (folder / "DONE").write_text("{}")
  assert world.marks_seen()[1:] == (True, 65)

  def call(*command):
    out = "65\n" if "cat" in command else (
        "a/lock/000002.json,17\na/STOPPED,3\n"
    )
    return subprocess.CompletedProcess(command, 0, out, "")

  world = babysit.World("gs://b/a", (), call=call)
  assert world.marks_seen() == ("17", False, 65)


@pytest.mark.parametrize(
    ("out", "status"), [("not json", 0), ("{}", 0), ("", 1)]
)
def test_an_answer_that_is_none_is_no_state(out, status):
  def call(*command):
    return subprocess.CompletedProcess(command, status, out, "PERMISSION")

  with pytest.raises(babysit.LookError):
    babysit.World("gs://b/a", (), call=call).look()


def test_dry_run_prints_its_commands(checkout):
  result = checkout.run(
      "babysit.sh", "--dry-run", *RUN, **harness.SETTINGS
  )
  assert result.returncode == 0, result.stderr
  assert not result.acts
  harness.check_golden("babysit.txt", checkout.plain(result.stdout))
