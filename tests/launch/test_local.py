"""Runs on this machine: run.sh, supervise.sh, local_multiprocess.sh.

A stand-in for Python writes down how it is called and ends as it is told; what
waits and signals is real.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

# Ends with the status that PLAN names for this start, or waits for SIGTERM.
STUB = f"""#!{sys.executable} -SE
import json, os, signal, sys, time
if sys.argv[1] == "-c":
  os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
plan = os.environ["PLAN"].split()
rank = [a[13:] for a in sys.argv if a.startswith("--process_id=")]
rank = rank[0] if rank else "0"
log = os.environ["STUB_LOG"] + rank
starts = len(open(log).readlines()) if os.path.exists(log) else 0
step = plan[min(starts, len(plan) - 1)]
if ":" in step:  # A status for each process.
  step = step.split(":")[int(rank)]
names = ("PWD", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "TFDS_DATA_DIR",
         "JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "PYTHONUNBUFFERED")
with open(log, "a") as f:
  f.write(json.dumps(dict(argv=sys.argv[1:], pid=os.getpid(), at=time.time(),
                          env={{n: os.environ.get(n) for n in names}})) + "\\n")
if step.startswith("wait"):
  status = int(step[4:] or 75)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
  print("waiting", flush=True)
  time.sleep(30)
  sys.exit(99)
print("ending", flush=True)
if step == "abort":
  os.abort()
sys.exit(int(step))
"""


@pytest.fixture
def local(checkout):
  checkout.python = checkout.write(checkout.bin / "stub-python", STUB)
  checkout.stub_log = checkout.folder / "stub"
  return checkout


def env(local, plan, **more):
  stub = {"PYTHON": local.python, "STUB_LOG": local.stub_log, "PLAN": plan}
  return local.env(**stub | more)


def run(local, script, *args, plan="0", **more):
  """Runs a script to its end; `starts` are those of process 0."""
  result = subprocess.run(
      local.command(script, *args), cwd=local.folder, capture_output=True,
      env=env(local, plan, **more), text=True, check=False, timeout=30,
  )
  result.starts = starts(local)
  return result


# Shells let what they start in the background ignore interrupts, tests
# included, and a script cannot take that back.
_HEARING = (sys.executable, "-c", """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
""")


def start(local, script, *args, plan, count=1, **more):
  """Starts a script and waits until `count` processes wait for a signal."""
  process = subprocess.Popen(
      [*_HEARING, *map(str, local.command(script, *args))], cwd=local.folder,
      env=env(local, plan, **more), text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
  )
  seen = ""
  while seen.count("waiting") < count:
    line = process.stdout.readline()
    assert line, seen
    seen += line
  return process


def starts(local, rank=0) -> list[dict]:
  """The starts of one process, in order."""
  path = pathlib.Path(f"{local.stub_log}{rank}")
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


# run.sh ---------------------------------------------------------------------


def test_run_becomes_main_with_its_environment(local):
  (local.folder / "elsewhere").mkdir()
  result = run(
      local, "run.sh", "--config=a b.py", "--workdir=/w/runs/one", plan="7",
      LIBTPU_INIT_ARGS="--x=1", TFDS_DATA_DIR="/data",
  )
  assert result.returncode == 7
  (call,) = result.starts
  assert call["argv"] == [
      "-m", "bcm_jax.main", "--config=a b.py", "--workdir=/w/runs/one"
  ]
  assert call["env"] == {
      "PWD": str(local.folder),
      "PYTHONPATH": str(local.root),
      "JAX_COMPILATION_CACHE_DIR": "/w/runs/compile_cache",
      "TFDS_DATA_DIR": "/data",
      "JAX_PLATFORMS": None,
      "LIBTPU_INIT_ARGS": "--x=1",
      "PYTHONUNBUFFERED": "1",
  }


@pytest.mark.parametrize(
    ("args", "settings", "workdir", "cache"),
    [
        ([], {"WORKDIR": "/w/r"}, "--workdir=/w/r", "/w/compile_cache"),
        (["--workdir=/a/b/"], {"WORKDIR": "/w/r"}, "--workdir=/a/b/",
         "/a/compile_cache"),
        (["--workdir=here"], {}, "--workdir=here",
         "HOME/.cache/bcm_jax/compile_cache"),
        ([], {}, None, "HOME/.cache/bcm_jax/compile_cache"),
        (["--workdir=/a/b"], {"JAX_COMPILATION_CACHE_DIR": "/c"},
         "--workdir=/a/b", "/c"),
    ],
)
def test_work_directory_and_cache(local, args, settings, workdir, cache):
  result = run(local, "run.sh", *args, **settings)
  (call,) = result.starts
  given = [a for a in call["argv"] if a.startswith("--workdir")]
  assert given == ([workdir] if workdir else [])
  found = call["env"]["JAX_COMPILATION_CACHE_DIR"]
  assert found == cache.replace("HOME", str(local.folder))


@pytest.mark.parametrize("args", [
    ["--workdir", "/mine/a b"], ["-workdir", "/mine/a b"],
    ["-workdir=/mine/a b"], ["--workdir=/of/first", "--workdir", "/mine/a b"],
    ["--workdir", "/of/first", "--workdir=/mine/a b"],
    ["--mode", "table", "--workdir", "/mine/a b", "--config", "x"],
])
def test_a_work_directory_in_two_words_wins_over_the_settings(local, args):
  result = run(local, "run.sh", *args, WORKDIR="/of/settings")
  (call,) = result.starts
  assert call["argv"] == ["-m", "bcm_jax.main", *args]
  assert call["env"]["JAX_COMPILATION_CACHE_DIR"] == "/mine/compile_cache"


def test_other_flags_in_two_words_are_passed_on(local):
  args = ["--mode", "sample", "--config", "a b.py", "--config.x", "--workdir2"]
  result = run(local, "run.sh", *args, WORKDIR="/of/settings")
  (call,) = result.starts
  assert call["argv"] == [
      "-m", "bcm_jax.main", *args, "--workdir=/of/settings"
  ]


def test_the_script_is_the_process(local):
  process = start(local, "run.sh", plan="wait75")
  (call,) = starts(local)
  assert call["pid"] == process.pid
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=10) == 75


def test_run_prefers_the_virtual_environment(local):
  folder = local.root / ".venv" / "bin"
  folder.mkdir(parents=True)
  (folder / "python").symlink_to(local.python)
  result = run(local, "run.sh", plan="3", PYTHON="")
  assert result.returncode == 3


def test_run_dry(local):
  result = run(
      local, "run.sh", "--dry-run", "--config=a b", "--workdir=/w/r",
      LIBTPU_INIT_ARGS="--x=1 --y=2",
  )
  assert not result.starts
  assert local.plain(result.stdout).splitlines() == [
      "export JAX_COMPILATION_CACHE_DIR=/w/compile_cache",
      "export 'LIBTPU_INIT_ARGS=--x=1 --y=2'",
      "exec BIN/stub-python -m bcm_jax.main '--config=a b' --workdir=/w/r",
  ]


def test_run_without_python_says_so(local):
  (local.bin / "python3").unlink()
  result = run(local, "run.sh", PYTHON="")
  assert result.returncode == 65
  assert "error: no Python" in result.stderr


# supervise.sh -----------------------------------------------------------------


def supervise(local, *options, plan, **more):
  return run(
      local, "supervise.sh", *options, *local.command("run.sh"), "--a=b c",
      plan=plan, **more,
  )


def test_done_is_done(local):
  result = supervise(local, plan="0")
  assert (result.returncode, len(result.starts)) == (0, 1)
  assert result.starts[0]["argv"][-1] == "--a=b c"


def test_bad_input_is_not_started_again(local):
  note = local.folder / "new" / "STOPPED"
  result = supervise(local, f"--stopped-file={note}", plan="65 0")
  assert (result.returncode, len(result.starts)) == (65, 1)
  assert note.read_text() == "65\n"


def test_preempted_is_started_again(local):
  note = local.folder / "STOPPED"
  note.write_text("65\n")
  result = supervise(
      local, "--pause-secs=0", f"--stopped-file={note}", plan="75 75 75 0"
  )
  assert (result.returncode, len(result.starts)) == (0, 4)
  assert not note.exists()


def test_a_brief_preempted_run_is_not_started_again_at_once(local):
  result = supervise(local, "--pause-secs=1", plan="75 0")
  first, second = result.starts
  assert second["at"] - first["at"] >= 1
  assert "restarting in 1 s" in result.stderr


def test_preempted_passes_if_somebody_else_restarts(local):
  result = supervise(local, "--pass-preempted", plan="75 0")
  assert (result.returncode, len(result.starts)) == (75, 1)


def test_crashes_are_started_again_a_number_of_times(local):
  note = local.folder / "STOPPED"
  result = supervise(
      local, "--pause-secs=0", "--max-restarts=2", f"--stopped-file={note}",
      plan="1 abort 70",
  )
  assert (result.returncode, len(result.starts)) == (70, 3)
  assert "status 134: restart 2 of 2" in result.stderr
  assert note.read_text() == "70\n"


def test_crashes_that_pass_are_no_failure(local):
  result = supervise(local, "--pause-secs=0", plan="1 75 1 0")
  assert (result.returncode, len(result.starts)) == (0, 4)


@pytest.mark.slow
def test_pauses_grow(local):
  result = supervise(
      local, "--pause-secs=1", "--max-restarts=2", plan="1 1 0"
  )
  at = [s["at"] for s in result.starts]
  assert at[1] - at[0] >= 1
  assert at[2] - at[1] >= 2


def test_healthy_runs_start_the_count_anew(local):
  result = supervise(
      local, "--pause-secs=0", "--max-restarts=1", "--healthy-secs=0",
      plan="1 1 1 1 0",
  )
  assert (result.returncode, len(result.starts)) == (0, 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("status", [75, 0, 134])
def test_a_signal_reaches_the_run_which_is_not_started_again(
    local, number, status
):
  process = start(
      local, "supervise.sh", *local.command("run.sh"), plan=f"wait{status} 0"
  )
  process.send_signal(number)
  assert process.wait(timeout=10) == status
  assert len(starts(local)) == 1


def test_who_is_told_to_stop_does_not_give_up(local):
  note = local.folder / "STOPPED"
  process = start(
      local, "supervise.sh", "--max-restarts=0", f"--stopped-file={note}",
      *local.command("run.sh"), plan="wait134",
  )
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=10) == 134
  assert not note.exists()


def test_a_signal_ends_a_pause(local):
  command = local.command("run.sh")
  process = subprocess.Popen(
      local.command("supervise.sh", "--pause-secs=30", *command),
      env=env(local, "9"), text=True, stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
  )
  assert "restart 1 of 5" in process.stderr.readline()
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=10) == 9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "COMMAND"),
        (["--max-restarts=many", "x"], "got 'many', expected a whole number"),
        (["--restarts=3", "x"], "unknown option --restarts=3"),
    ],
)
def test_supervise_refuses_nonsense(local, args, message):
  result = run(local, "supervise.sh", *args)
  assert result.returncode == 65
  assert message in result.stderr


def test_supervise_dry(local):
  result = run(local, "supervise.sh", "--dry-run", "x", "a b")
  assert result.stdout == "x 'a b'\n"


# local_multiprocess.sh --------------------------------------------------------


def several(local, plan, count=3, **more):
  return run(
      local, "local_multiprocess.sh", str(count), "--config=a b", plan=plan,
      **more,
  )


def test_every_process_is_told_who_it_is(local):
  result = several(local, "0")
  assert result.returncode == 0, result.stderr
  calls = [starts(local, rank)[0] for rank in range(3)]
  addresses = {c["argv"][3] for c in calls}
  assert len(addresses) == 1
  assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", addresses.pop())
  for rank, call in enumerate(calls):
    assert call["argv"][:3] == ["-m", "bcm_jax.main", "--config=a b"]
    assert call["argv"][4:] == ["--num_processes=3", f"--process_id={rank}"]
    assert call["env"]["JAX_PLATFORMS"] == "cpu"
  lines = result.stdout.splitlines()
  assert sorted(lines) == ["[0] ending", "[1] ending", "[2] ending"]


@pytest.mark.parametrize(
    ("plan", "status"),
    [
        ("75:75:75", 75), ("0:75:0", 75), ("0:65:75", 65), ("0:0:abort", 134),
    ],
)
def test_status_of_several(local, plan, status):
  assert several(local, plan).returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process(local, number):
  process = start(
      local, "local_multiprocess.sh", "2", plan="wait", count=2
  )
  process.send_signal(number)
  assert process.wait(timeout=10) == 75


def test_a_signal_to_one_process_ends_that_one(local):
  process = start(
      local, "local_multiprocess.sh", "2", plan="wait", count=2
  )
  for rank in (1, 0):
    os.kill(starts(local, rank)[0]["pid"], signal.SIGTERM)
    time.sleep(0.3)
  assert process.wait(timeout=10) == 75


@pytest.mark.slow
def test_peers_of_a_failed_process_do_not_wait_for_ever(local):
  result = several(local, "wait:9:wait", PEER_SECS=1)
  assert result.returncode == 9


def test_the_first_failure_counts(local):
  # Process 0 fails as well, but only when it is told to go.
  result = several(local, "wait3:9", count=2, PEER_SECS=1)
  assert result.returncode == 9


def test_several_dry_and_nonsense(local):
  dry = run(local, "local_multiprocess.sh", "--dry-run", "2", "--a=b c")
  assert not dry.starts
  assert [line.split("run.sh' ")[1] for line in dry.stdout.splitlines()] == [
      "'--a=b c' --coordinator=127.0.0.1:PORT --num_processes=2 "
      f"--process_id={rank}" for rank in range(2)
  ]
  for wrong in ("", "0", "two", "--config=x"):
    result = run(local, "local_multiprocess.sh", wrong)
    assert result.returncode == 65
    assert "N: got " in result.stderr


def test_supervised_processes_are_restarted_together(local):
  result = run(
      local, "supervise.sh", "--pause-secs=0",
      *local.command("local_multiprocess.sh"), "2", plan="75:75 0:0",
  )
  assert result.returncode == 0, result.stderr
  assert [len(starts(local, rank)) for rank in (0, 1)] == [2, 2]
