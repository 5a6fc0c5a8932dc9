"""Setting up and testing, with a Python that writes down what it is asked."""

import os
import pathlib
import shutil
import stat
import subprocess

import pytest

PYTEST = "<-m><pytest><-n><auto><--dist><loadfile>"

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ("launch/test.sh", "launch/quickstart.sh", ".ci/run")
TOOLS = ("bash", "dirname", "cksum", "cat", "find", "sort", "mkdir", "cp")

# Stands in for python3 and, once `-m venv` has run, for .venv/bin/python. It
# refuses the version question where OLD is set and `import ensurepip` where
# NO_ENSUREPIP is.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) [[ -z ${OLD:-} ]]; exit ;;
  *ensurepip*) [[ -z ${NO_ENSUREPIP:-} ]]; exit ;;
  -c*) exit 0 ;;
  --version) echo "Python 3.11.0"; exit ;;
  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *bcm_jax.main*) mkdir -p "$RUN/eval"; : >"$RUN/eval/1.json" ;;
esac
printf '<%s>' "JAX_PLATFORMS=${JAX_PLATFORMS:-}" "$@" >>"$LOG"
echo >>"$LOG"
[[ "$*" != *"${FAIL_ON:-nothing at all}"* ]]
"""


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
  """The scripts in a folder whose name has a space, and only a few tools."""
  root = tmp_path / "check out"
  for name in (
      *(*SCRIPTS, "launch/common.sh", "launch/venv.sh"),
      *("setup.py", "pyproject.toml", "requirements.txt"),
  ):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, root / name)
  tools = tmp_path / "bin"
  tools.mkdir()
  for tool in TOOLS:
    (tools / tool).symlink_to(shutil.which(tool))
  (tools / "env").symlink_to("/usr/bin/env")
  python = tools / "python3"
  python.write_text(FAKE_PYTHON)
  python.chmod(0o755)
  return root


def launch(checkout, script, *args, **env) -> subprocess.CompletedProcess:
  """Runs a script from another folder; its log of calls is in .log."""
  log = checkout.parent / "log"
  log.write_text("")
  env = {
      "PATH": str(checkout.parent / "bin"),
      "LOG": str(log),
      "RUN": "runs/digits",
  } | env
  result = subprocess.run(
      [str(checkout / script), *args],
      cwd=checkout.parent,
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )
  result.log = log.read_text().splitlines()
  return result


def test_scripts_are_executable():
  for name in SCRIPTS:
    assert os.stat(ROOT / name).st_mode & stat.S_IXUSR, name


def test_first_run_makes_venv_installs_and_tests(checkout):
  result = launch(checkout, "launch/test.sh", "-k", "a or b")
  assert result.returncode == 0, result.stderr
  assert result.log == [
      "<JAX_PLATFORMS=><-m><venv><--clear><.venv>",
      "<JAX_PLATFORMS=><-m><pip><install><--quiet><-e><.[test]>",
      f"<JAX_PLATFORMS=cpu>{PYTEST}<-k><a or b>",
  ]


def test_second_run_only_tests_until_setup_changes(checkout):
  launch(checkout, "launch/test.sh")
  again = launch(checkout, "launch/test.sh", JAX_PLATFORMS="tpu")
  assert again.log == [f"<JAX_PLATFORMS=tpu>{PYTEST}<-m><not slow>"]
  with open(checkout / "requirements.txt", "a") as f:
    f.write("another\n")
  changed = launch(checkout, "launch/test.sh")
  assert [".[test]" in line for line in changed.log] == [True, False]


def test_quickstart_after_the_tests_installs_nothing(checkout):
  launch(checkout, "launch/test.sh")
  again = launch(checkout, "launch/quickstart.sh")
  assert ["bcm_jax.main" in line for line in again.log] == [True]


def test_a_failed_install_is_tried_again(checkout):
  failed = launch(checkout, "launch/test.sh", FAIL_ON="pip install")
  assert failed.returncode == 1
  assert "error: pip could not install bcm_jax" in failed.stderr
  assert not any("pytest" in line for line in failed.log)
  assert "pip" in launch(checkout, "launch/test.sh").log[0]


def test_failing_tests_fail_the_script(checkout):
  assert launch(checkout, "launch/test.sh", FAIL_ON="pytest").returncode == 1
  assert launch(checkout, ".ci/run", FAIL_ON="pytest").returncode == 1


def test_ci_says_nothing_after_pytest(checkout):
  launch(checkout, ".ci/run")
  again = launch(checkout, ".ci/run")
  assert again.log == [f"<JAX_PLATFORMS=cpu>{PYTEST}<-q>"]
  assert again.stdout + again.stderr == ""


@pytest.mark.parametrize("script", ["launch/test.sh", "launch/quickstart.sh"])
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OLD": "1"}, "error: no Python >= 3.11 found"),
        ({"NO_ENSUREPIP": "1"}, "sudo apt install python3-venv"),
    ],
)
def test_no_usable_python_is_said_in_one_line(checkout, script, env, message):
  result = launch(checkout, script, **env)
  assert result.returncode == 1
  assert message in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert not result.log


def test_a_newer_python_beside_an_old_one_is_used(checkout):
  tools = checkout.parent / "bin"
  shutil.copy(tools / "python3", tools / "python3.12")
  (tools / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
  assert launch(checkout, "launch/test.sh").returncode == 0


@pytest.mark.parametrize(
    ("args", "workdir", "rest"),
    [
        ([], "runs/digits", ""),
        (["--config.seed=1"], "runs/digits", "<--config.seed=1>"),
        (["my run", "--a=b"], "{cwd}/my run", "<--workdir=my run><--a=b>"),
        (["/tmp/../tmp/x"], "/tmp/../tmp/x", "<--workdir=/tmp/../tmp/x>"),
        (["--workdir", "my run"], "{cwd}/my run", "<--workdir><my run>"),
        (["--a=b", "--workdir=/tmp/x"], "/tmp/x", "<--a=b><--workdir=/tmp/x>"),
    ],
)
def test_quickstart_trains_the_digits(checkout, args, workdir, rest):
  workdir = workdir.format(cwd=checkout.parent)
  run = str(checkout.parent / "run")
  result = launch(checkout, "launch/quickstart.sh", *args, RUN=run)
  assert result.log[1] == "<JAX_PLATFORMS=><-m><pip><install><--quiet><-e><.>"
  assert result.log[2:] == [
      "<JAX_PLATFORMS=><-m><bcm_jax.main><--config=configs/digits.py>"
      f"{rest}<--workdir={workdir}>"
  ]


def test_quickstart_ends_with_where_the_numbers_are(checkout):
  result = launch(checkout, "launch/quickstart.sh")
  assert result.returncode == 0, result.stderr
  assert "runs/digits/eval/1.json" in result.stdout.splitlines()


def test_quickstart_fails_as_training_does(checkout):
  result = launch(checkout, "launch/quickstart.sh", FAIL_ON="bcm_jax.main")
  assert result.returncode == 1
  assert "Images and metrics" not in result.stdout
