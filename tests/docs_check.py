"""The parts of the documentation that follow from code and measurements.

  python -m tests.docs_check     # updates the numbers of quoted lines
"""

import ast
from collections.abc import Iterator
import importlib.util
import json
import pathlib
import re
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("architecture", "methods")]
_QUOTE = re.compile(r"^\| `([\w/.]+):\d+` \| `([^`]+)` \|", re.MULTILINE)


def renumber(text: str, root: pathlib.Path = ROOT) -> str:
  """Returns a page with the current line of every row '| `file:line` | `code`'.

  Raises:
    ValueError: not exactly one line of the file holds the code.
  """

  def current(match: re.Match) -> str:
    file, code = match.groups()
    lines = (root / file).read_text(encoding="utf-8").splitlines()
    found = [i for i, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
      raise ValueError(f"{file}: {code!r} is in lines {found}, expected one")
    return f"| `{file}:{found[0]}` | `{code}` |"

  return _QUOTE.sub(current, text)


def benchmark(name: str) -> types.ModuleType:
  """Returns benchmarks/NAME.py, loaded anew."""
  path = ROOT / "benchmarks" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def result(name: str) -> dict:
  """Returns docs/results/NAME.json."""
  path = ROOT / "docs" / "results" / f"{name}.json"
  return json.loads(path.read_text(encoding="utf-8"))


def scale_rows() -> Iterator[str]:
  """Yields the rows of docs/scale.md that the committed reports give."""
  gib = 2**30
  for name in ("cifar10_v4", "cifar10_v5e", "cifar10_v6e", "imagenet64_v5e_16",
               "imagenet64_v5e_256"):
    report = result(f"compile_{name}")
    (phase,) = report["phases"].values()
    reduced = phase["collectives"]["all-reduce"]["bytes"]
    yield (
        f"| {name.partition('_')[0]}.py | {report['topology']} | "
        f"{report['chips']} | {report['examples_per_chip']} | "
        f"{phase['bytes']['peak'] / gib:.1f} of {report['hbm_gib']:.1f} "
        f"({100 * phase['of_hbm']:.0f}%) | {phase['flops'] / 1e12:.1f} | "
        f"{phase['bytes_moved'] / 1e9:.0f} | {reduced / 1e6:.0f} | "
        f"{phase['roofline_ms']['bound']:.0f} | "
        f"{phase['seconds']['compile']:.0f} |"
    )
  for name in ("digits", "cifar10_jpeg"):
    for backend, r in result(f"step_time_{name}")["backends"].items():
      yield (
          f"| {name}.py | {backend} | {r['ms_per_step']:.0f} | "
          f"{r['images_per_second']:.0f} | {100 * r['mfu']:.0f}% | "
          f"{100 * r['data_wait_share']:.1f}% | {r['compile_seconds']:.0f} |"
      )
    one = result(f"scaling_{name}")["scaling"][-1]
    reduced = one["collectives"]["all-reduce"]["bytes"]
    yield (
        f"| {name}.py | {one['flops'] / 1e9:.2f} | "
        f"{one['bytes_moved'] / 1e6:.0f} | {reduced / 1e6:.2f} |"
    )


def named_tests(text: str) -> list[tuple[str, str]]:
  """Returns (file, function or '') of every test that a page names."""
  found, file = [], ""
  pattern = r"(tests/[\w/]+\.py)?(?:::(\w+))?"
  for path, name in re.findall(pattern, re.sub(r"::\s+", "::", text)):
    file = path or file
    if path or name:
      found.append((file, name))
  return found


def marks(file: str, name: str) -> str:
  """Returns the decorators of a test function and the marks of its module.

  Raises:
    KeyError: the file has no such function.
  """
  tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
  of_module = [
      ast.unparse(node.value) for node in tree.body
      if isinstance(node, ast.Assign)
      and ast.unparse(node.targets[0]) == "pytestmark"
  ]
  functions = {
      node.name: [ast.unparse(d) for d in node.decorator_list]
      for node in tree.body if isinstance(node, ast.FunctionDef)
  }
  return "\n".join([*of_module, *functions[name]])


if __name__ == "__main__":
  for page in PAGES:
    text = renumber(page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
