"""docs/editing.md says what the committed results say."""

import json

import pytest

from bcm_jax.editing import tasks
from tests import scripts


@pytest.fixture(scope="module")
def benchmark():
  return scripts.benchmark("editing")


def test_the_page_is_what_the_benchmark_writes(benchmark):
  text = benchmark.PAGE.read_text(encoding="utf-8")
  assert benchmark.page(text) == text
  for match in benchmark.MARKED.finditer(text):
    assert match[2].partition("_")[2] in benchmark.TASKS


def test_every_task_is_told_with_its_constants(benchmark):
  text = benchmark.PAGE.read_text(encoding="utf-8").partition("## Results")[0]
  for name, task in tasks.TASKS.items():
    (row,) = [r for r in text.splitlines() if r.startswith(f"| `{name}` |")]
    if task.noise and name != "inpaint":
      assert f"e = {task.noise:g}" in row
    if task.level:
      assert f"level {task.level:g}" in row
    assert row.split("|")[3].strip() in (
        ("yes",) if task.both_ways else ("no", "to measure")
    )
  assert f"from {tasks.TASKS['inpaint'].noise:g} to {tasks.LAST_NOISE}" in (
      text
  )


def test_numbers_reach_the_page(benchmark, monkeypatch, tmp_path):
  monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
  marked = "<!-- editing: x_holes -->\nold\n<!-- end -->"
  assert "Not run yet." in benchmark.page(marked)
  record = {
    "tasks": {
      "holes": {
        "a": {"psnr": 12.345, "class_accuracy": 0.5},
        "b": {"class_accuracy": 0.25},
      }
    }
  }
  (tmp_path / "editing_x.json").write_text(json.dumps(record))
  page = benchmark.page(marked)
  assert "| a | 12.35 | 50.0% |" in page or "| a | 12.34 | 50.0% |" in page
  assert "| b | - | 25.0% |" in page and "old" not in page
