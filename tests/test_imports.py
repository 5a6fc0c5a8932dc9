"""Every module imports, and only TFDS sources need TensorFlow to."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# TFDS sources, whose absence their callers catch.
NEED_TENSORFLOW = {"bcm_jax.data.digits_tfds"}

# Runs apart from this process, where TensorFlow may already be loaded. The
# finder makes an installed TensorFlow look like one that is not there.
SCRIPT = """
import importlib, json, sys

class NoTensorFlow:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "tensorboard"):
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTensorFlow())
failures = {}
for name in sys.argv[1:]:
  try:
    importlib.import_module(name)
  except Exception as e:
    failures[name] = f"{type(e).__name__}: {e}"
print(json.dumps(failures))
"""


def import_without_tensorflow(names, cwd) -> dict[str, str]:
  """Returns {module: error} of the modules that do not import."""
  result = subprocess.run(
      [sys.executable, "-c", SCRIPT, *names],
      cwd=cwd,
      capture_output=True,
      text=True,
      check=True,
  )
  return json.loads(result.stdout.splitlines()[-1])


def all_modules() -> list[str]:
  """Returns the dotted names of the package's modules."""
  files = sorted((ROOT / "bcm_jax").rglob("*.py"))
  names = (".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files)
  return [name.removesuffix(".__init__") for name in names]


@pytest.mark.slow
def test_modules_import_without_tensorflow():
  names = all_modules()
  assert {"bcm_jax", "bcm_jax.main", *NEED_TENSORFLOW} <= set(names)
  failures = import_without_tensorflow(names, ROOT)
  for name in NEED_TENSORFLOW:
    # An ImportError of TensorFlow and nothing else.
    missing = "ModuleNotFoundError: No module named 'tensorflow'"
    assert failures.pop(name, missing) == missing
  assert not failures


def test_a_module_that_needs_tensorflow_is_caught(tmp_path):
  (tmp_path / "eager.py").write_text("import tensorflow as tf\n")
  (tmp_path / "lazy.py").write_text("def f():\n  import tensorflow\n")
  (tmp_path / "guarded.py").write_text(
      "try:\n  import tensorflow\nexcept ImportError:\n  tensorflow = None\n"
  )
  failures = import_without_tensorflow(["eager", "lazy", "guarded"], tmp_path)
  assert list(failures) == ["eager"]
  assert "No module named 'tensorflow'" in failures["eager"]
