"""The lock files: complete, exact, and up to what setup.py asks for."""

import ast
import json
import subprocess

import lock
from packaging import requirements
from packaging import utils
import pytest

from tests.launch import harness

EXTRAS = {"tpu": {"jax", "jaxlib", "libtpu"}, "cuda": {"jax-cuda12-plugin"}}


def pinned(extra: str) -> dict[str, str]:
  """Returns {name: version} of a lock file."""
  text = (harness.ROOT / "launch" / f"requirements-{extra}.txt").read_text()
  lines = [x for x in text.splitlines() if not x.startswith("#")]
  pairs = [line.split("==") for line in lines]
  assert all(len(pair) == 2 for pair in pairs)
  assert len({name for name, _ in pairs}) == len(pairs)
  return dict(pairs)


def asked() -> list[requirements.Requirement]:
  """What setup.py asks for on Linux x86_64."""
  text = (harness.ROOT / "requirements.txt").read_text()
  lines = [x.split("#")[0].strip() for x in text.splitlines()]
  tree = ast.parse((harness.ROOT / "setup.py").read_text())
  (tensorflow,) = (
      ast.literal_eval(node.value) for node in tree.body
      if isinstance(node, ast.Assign) and node.targets[0].id == "TENSORFLOW"
  )
  found = [requirements.Requirement(x) for x in [*lines, *tensorflow] if x]
  machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
  return [
      r for r in found if r.marker is None or r.marker.evaluate(machine)
  ]


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_requirement_is_pinned_within_its_bounds(extra):
  pins = pinned(extra)
  wanted = asked()
  assert len(wanted) > 15
  for requirement in wanted:
    name = utils.canonicalize_name(requirement.name)
    assert name in pins, f"{name}: python launch/lock.py {extra}"
    assert requirement.specifier.contains(pins[name]), name
  assert set(pins) >= EXTRAS[extra]
  assert pins["jax"] == pins["jaxlib"]


def test_both_files_agree_where_they_overlap():
  tpu, cuda = pinned("tpu"), pinned("cuda")
  assert {n: tpu[n] for n in tpu.keys() & cuda} == {
      n: cuda[n] for n in tpu.keys() & cuda
  }


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_head_says_how_it_was_made_and_nothing_of_an_index(extra):
  text = (harness.ROOT / "launch" / f"requirements-{extra}.txt").read_text()
  assert f"#   python launch/lock.py {extra}\n" in text
  assert "://" not in text and "index" not in text


def test_lock_is_made_of_pips_report(monkeypatch, tmp_path):
  packages = [("bcm_jax", "1"), ("Zed_a", "2.0"), ("abc", "1.0")]
  report = {
      "pip_version": "99",
      "environment": {"python_version": "3.11"},
      "install": [
          {"metadata": {"name": n, "version": v}} for n, v in packages
      ],
  }

  def run(command, check):
    if "--report" in command:
      path = command[command.index("--report") + 1]
      open(path, "w").write(json.dumps(report))
      assert command[-1].endswith("[tpu]")
      assert "--dry-run" in command

  monkeypatch.setattr(lock.venv, "create", lambda *args, **kwargs: None)
  monkeypatch.setattr(lock.subprocess, "run", run)
  text = lock.lock("tpu", lock.resolve("tpu"))
  assert text.splitlines()[-2:] == ["abc==1.0", "zed-a==2.0"]


def test_unknown_extra_is_refused(checkout):
  result = checkout.run("lock.py", "gpu")
  assert result.returncode == 1
  assert "expected one of tpu, cuda" in result.stderr


def test_failing_pip_is_not_hidden(monkeypatch):
  def run(command, check):
    raise subprocess.CalledProcessError(1, command)

  monkeypatch.setattr(lock.venv, "create", lambda *args, **kwargs: None)
  monkeypatch.setattr(lock.subprocess, "run", run)
  with pytest.raises(subprocess.CalledProcessError):
    lock.resolve("tpu")
