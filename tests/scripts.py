"""Scripts outside of the package, as modules."""

import importlib.util
import pathlib
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]


def benchmark(name: str) -> types.ModuleType:
  """benchmarks/NAME.py, loaded anew."""
  path = ROOT / "benchmarks" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
