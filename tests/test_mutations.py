"""The list of mutations fits the code, the tests and its page."""

import ast
import pathlib

import pytest

from tests import mutations

HERE = pathlib.Path(__file__).resolve().parent


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_names_code_and_a_test(mutation):
  text = (HERE.parent / "bcm_jax" / mutation.file).read_text(encoding="utf-8")
  assert text.count(mutation.old) == 1
  ast.parse(text.replace(mutation.old, mutation.new))
  file, _, name = mutation.test.partition("::")
  source = (HERE / file).read_text(encoding="utf-8")
  assert not name or f"def {name.partition('[')[0]}(" in source


def test_the_page_lists_all():
  page = (HERE / "mutations.md").read_text(encoding="utf-8")
  rows = [line.split("|") for line in page.splitlines()
          if line.startswith("| ")][1:]
  found = {row[1].strip(): row[2].strip(" `") for row in rows}
  assert found == {m.name: m.test for m in mutations.MUTATIONS}
