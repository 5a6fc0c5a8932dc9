"""What a runner finds, and the lines that say so."""

from collections.abc import Iterable
import math
from typing import Any, NamedTuple

import numpy as np


class Check(NamedTuple):
  """One output: ours, theirs, and the largest error allowed.

  `limit` is a number or an array like `expected`; 0 wants equality.
  """

  name: str
  actual: Any
  expected: np.ndarray
  limit: Any


class Missing(NamedTuple):
  """An output that the package cannot compute, and what it lacks."""

  name: str
  reason: str


class Pending(NamedTuple):
  """An output whose part of the package is still to come."""

  name: str
  reason: str


class Line(NamedTuple):
  """One line of the report."""

  status: str
  file: str
  precision: str
  text: str

  @property
  def passed(self) -> bool:
    return self.status == "PASS"

  def __str__(self):
    return f"{self.status:7} {self.file:32} {self.precision:8} {self.text}"


def ratio(check: Check) -> float:
  """Largest error in units of its limit; infinite where ours is not finite."""
  actual = np.asarray(check.actual, np.float64)
  error = np.abs(actual - check.expected)
  limit = np.broadcast_to(np.asarray(check.limit, np.float64), error.shape)
  if not error.size:
    return 0.0
  if not np.isfinite(error).all():
    return math.inf
  with np.errstate(divide="ignore", invalid="ignore"):
    each = np.where(error == 0, 0.0, error / limit)
  return float(each.max())


def _one_line(text: Any) -> str:
  return " ".join(str(text).split())


def failure(file: str, precision: str, error: Exception) -> Line:
  """The line of a file whose runner could not go on."""
  text = f"{type(error).__name__}: {_one_line(error)}"
  return Line("FAIL", file, precision, text)


def compared(
    file: str, precision: str, checks: list[Check], uncovered: list[str]
) -> Line:
  """The line of everything that was computed in one precision."""
  if uncovered:
    text = f"outputs that nothing computes: {shown(uncovered)}"
    return Line("FAIL", file, precision, text)
  shapes = [
      f"{c.name} is {np.shape(c.actual)}, expected {c.expected.shape}"
      for c in checks if np.shape(c.actual) != c.expected.shape
  ]
  if shapes:
    return Line("FAIL", file, precision, "; ".join(shapes[:4]))
  wrong = {
      c.name for c in checks
      if precision in ("float32", "float64")
      and np.asarray(c.actual).dtype.kind == "f"
      and np.asarray(c.actual).dtype != precision
  }
  if wrong:
    text = f"not computed in {precision}: {shown(sorted(wrong))}"
    return Line("FAIL", file, precision, text)
  ratios = {c.name: ratio(c) for c in checks}
  worst = max(ratios, key=ratios.get)
  failed = [name for name, r in ratios.items() if not r <= 1]
  text = (
      f"{worst}  error/tolerance {ratios[worst]:.3g}  "
      f"({len(checks)} checked)"
  )
  if len(failed) > 1:
    text += f"; too far: {shown(failed)}"
  return Line("FAIL" if failed else "PASS", file, precision, text)


def grouped(
    file: str, status: str, items: Iterable[Missing | Pending]
) -> list[Line]:
  """One line a reason, with the outputs that it concerns."""
  reasons: dict[str, list[str]] = {}
  for item in items:
    names = reasons.setdefault(item.reason, [])
    if item.name not in names:
      names.append(item.name)
  return [
      Line(status, file, "", f"{shown(names)}: {reason}")
      for reason, names in reasons.items()
  ]


def shown(names: list[str]) -> str:
  """A list of names, the tensors of a group as one, cut after eight."""
  short = list(dict.fromkeys(
      n.partition("/")[0] + "/*" if "/" in n else n for n in names
  ))
  more = f" and {len(short) - 8} more" if len(short) > 8 else ""
  return ", ".join(short[:8]) + more
