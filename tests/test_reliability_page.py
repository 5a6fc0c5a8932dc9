"""docs/reliability.md names tests that are there."""

import pathlib
import re

from bcm_jax import errors

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_on_the_page_exists():
  found, file = 0, None
  text = re.sub(r"::\s+", "::", PAGE)
  for path, name in re.findall(r"(tests/[\w/]+\.py)?(?:::(\w+))?", text):
    file = path or file
    if path:
      assert (ROOT / path).is_file(), path
    if name:
      source = (ROOT / file).read_text(encoding="utf-8")
      assert f"def {name}(" in source, f"{file}::{name}"
      found += 1
  assert found > 25


def test_every_promise_has_a_test():
  table = PAGE.partition("## Exit statuses")[0]
  rows = [line.split("|") for line in table.splitlines()
          if re.match(r"\| \d+ \|", line)]
  assert [int(row[1]) for row in rows] == list(range(1, 11))
  assert all("tests/" in row[3] for row in rows)


def test_the_statuses_are_those_of_the_code():
  for status in (errors.EXIT_BAD_INPUT, errors.EXIT_HANGING,
                 errors.EXIT_MACHINE, errors.EXIT_PREEMPTED):
    assert f"\n| {status} | " in PAGE
