"""Files and functions stay short enough to read in one go."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The longest file in lines, by place; the first that fits counts.
FILE_LINES = {"bcm_jax/main.py": 100, "configs": 80, "bcm_jax": 400}
FUNCTION_LINES = 60


def long_file(source: str, limit: int) -> list[str]:
  """Returns a complaint where source has more than `limit` lines."""
  lines = len(source.splitlines())
  return [f"{lines} lines, at most {limit}"] if lines > limit else []


def long_functions(source: str, limit: int = FUNCTION_LINES) -> list[str]:
  """Returns a complaint for each function longer than `limit` lines."""
  functions = (ast.FunctionDef, ast.AsyncFunctionDef)
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, functions):
      lines = node.end_lineno - node.lineno + 1
      if lines > limit:
        found.append(f"{node.name}() has {lines} lines, at most {limit}")
  return found


def limit_of(path: pathlib.Path) -> int:
  """Returns the longest that a file may be."""
  name = path.relative_to(ROOT).as_posix()
  return next(n for place, n in FILE_LINES.items() if name.startswith(place))


def test_files_and_functions_are_short():
  files = [p for f in ("bcm_jax", "configs") for p in (ROOT / f).rglob("*.py")]
  complaints = []
  for path in files:
    source = path.read_text(encoding="utf-8")
    found = long_file(source, limit_of(path)) + long_functions(source)
    complaints += [f"{path.relative_to(ROOT)}: {each}" for each in found]
  assert ROOT / "bcm_jax" / "main.py" in files
  assert not complaints


@pytest.mark.parametrize("place", FILE_LINES)
def test_long_files_are_caught(place):
  limit = limit_of(ROOT / place)
  assert limit == FILE_LINES[place]
  assert not long_file("x = 1\n" * limit, limit)
  assert long_file("x = 1\n" * (limit + 1), limit)


def test_long_functions_are_caught():
  # The def line counts too.
  fits = "class A:\n  def f(self):\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
  assert not long_functions(fits)
  assert long_functions(fits + "    x = 1\n") == [
      f"f() has {FUNCTION_LINES + 1} lines, at most {FUNCTION_LINES}"
  ]
