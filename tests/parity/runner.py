"""Runs the files of a folder: who takes a file, in which precisions."""

import argparse
from collections.abc import Callable, Iterator
import pathlib
import sys
import traceback
from typing import NamedTuple

import jax

from tests.parity import augment
from tests.parity import averages
from tests.parity import distribution_matching
from tests.parity import features
from tests.parity import files
from tests.parity import losses
from tests.parity import metrics
from tests.parity import networks
from tests.parity import report
from tests.parity import samplers
from tests.parity import schedules
from tests.parity import trajectories

Item = report.Check | report.Missing | report.Pending
Run = Callable[[files.Reference, str], Iterator[Item]]


class Runner(NamedTuple):
  """Who computes certain outputs of a file.

  Attributes:
    accepts: file -> whether it holds such outputs.
    run: (file, precision) -> what was found; precision is 'float32',
      'float64' or, for files without a float64 twin, 'exact'.
  """

  accepts: Callable[[files.Reference], bool]
  run: Run


RUNNERS = [
    Runner(*pair)
    for module in (
        networks, losses, trajectories, samplers, schedules, averages,
        augment, features, metrics, distribution_matching,
    )
    for pair in module.RUNNERS
]


def precisions(file: files.Reference, wanted: str | None) -> list[str]:
  """The precisions to run a file in."""
  if not any(file.twin(name) for name in file.outputs):
    return ["float32" if file.meta.get("f32_vs_f64") else "exact"]
  return [p for p in ("float32", "float64") if wanted in (None, p)]


def run_in(
    file: files.Reference, runners: list[Runner], precision: str
) -> list[Item]:
  """Everything that the runners find in one precision."""
  with jax.enable_x64(precision != "float32"):
    return [i for r in runners for i in r.run(file, precision)]


def compared(
    file: files.Reference, precision: str, checks: list[report.Check],
    uncovered: list[str],
) -> Iterator[report.Line]:
  """A line in a precision, and one of what was recorded in float32 alone."""
  alone, rest = [], []
  for c in checks:
    single = precision == "float64" and c.name in file.outputs
    (alone if single and not file.twin(c.name) else rest).append(c)
  if rest or uncovered:
    yield report.compared(file.path.name, precision, rest, uncovered)
  if alone:
    yield report.compared(file.path.name, "no twin", alone, [])


def lines(
    path: pathlib.Path, wanted: str | None, trace: bool = False
) -> Iterator[report.Line]:
  """The report on one file."""
  name, later = path.name, []
  try:
    file = files.load(path)
  except Exception as error:  # Whatever is wrong with a file: a line says so.
    yield report.failure(name, "", error)
    return
  runners = [r for r in RUNNERS if r.accepts(file)]
  if not runners:
    what = f"no runner knows {file.source} with {report.shown(file.outputs)}"
    yield report.Line("FAIL", name, "", what)
    return
  for precision in precisions(file, wanted):
    try:
      items = run_in(file, runners, precision)
    except Exception as error:
      if trace:
        traceback.print_exc()
      yield report.failure(name, precision, error)
      continue
    checks = [i for i in items if isinstance(i, report.Check)]
    later += [i for i in items if not isinstance(i, report.Check)]
    found = {i.name for i in items}
    uncovered = [
        n for n in file.outputs
        if n not in found and (precision != "float32" or file.twin(n))
    ]
    yield from compared(file, precision, checks, uncovered)
  for status, kind in (("FAIL", report.Missing), ("PENDING", report.Pending)):
    those = [i for i in later if isinstance(i, kind)]
    yield from report.grouped(name, status, those)


def arguments(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; exits with status 2 where it makes no sense."""
  parser = argparse.ArgumentParser(
      prog="python -m tests.parity",
      description="Our numbers against a folder of recorded ones.",
  )
  parser.add_argument("dir", type=pathlib.Path, help="folder of .npz files")
  parser.add_argument("--only", default="", help="part of the files' names")
  parser.add_argument("--traceback", action="store_true")
  for precision in ("float32", "float64"):
    parser.add_argument(
        f"--{precision}-only", dest="precision", action="store_const",
        const=precision,
    )
  return parser.parse_args(argv)


def main(argv: list[str]) -> int:
  """Prints the report; 0 if all passed, 1 if not, 2 for no such files."""
  options = arguments(argv)
  if not options.dir.is_dir():
    print(f"{options.dir} is not a folder", file=sys.stderr)
    return 2
  paths = sorted(
      p for p in options.dir.glob("*.npz") if options.only in p.name
  )
  if not paths:
    print(f"{options.dir} holds no such .npz files", file=sys.stderr)
    return 2
  passed = failed = 0
  for path in paths:
    for line in lines(path, options.precision, options.traceback):
      print(line, flush=True)
      passed, failed = passed + line.passed, failed + (not line.passed)
  print(f"{passed} passed, {failed} failed")
  return 1 if failed else 0
