"""Fault points die where they are told to, and nowhere else."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from bcm_jax.training import fault_injection

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(fault, code):
  return subprocess.run(
    [
      sys.executable,
      "-c",
      "from bcm_jax.training import fault_injection\n" + code,
    ],
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      fault_injection.ENVIRONMENT: fault,
    },
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


@pytest.mark.parametrize(
  "fault, reached",
  [
    ("mid_write", 1),
    ("mid_write:1", 1),
    ("mid_write:3", 3),
  ],
)
def test_the_nth_time_kills_without_a_word(fault, reached):
  done = run(
    fault,
    """
import atexit
atexit.register(print, "cleaned up")
for i in range(9):
  print(i, flush=True)
  fault_injection.point("before_save")
  fault_injection.point("mid_write", lambda: print("before", flush=True))
""",
  )
  assert done.returncode == fault_injection.EXIT_KILLED
  lines = [str(i) for i in range(reached)] + ["before"]
  assert done.stdout.split() == lines and not done.stderr


def test_without_the_variable_nothing_happens(monkeypatch):
  monkeypatch.delenv(fault_injection.ENVIRONMENT, raising=False)
  for name in fault_injection.POINTS:
    fault_injection.point(name, lambda: pytest.fail("reached"))


def test_an_unknown_point_is_a_mistake():
  with pytest.raises(KeyError):
    fault_injection.point("nowhere")


def test_every_point_lies_in_the_code_once():
  found = []
  for path in (ROOT / "bcm_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.Call):
        continue
      if ast.unparse(node.func) == "fault_injection.point":
        found.append(node.args[0].value)
  assert sorted(found) == sorted(fault_injection.POINTS)
