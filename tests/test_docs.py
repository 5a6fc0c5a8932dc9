"""The documentation agrees with the code and the committed results."""

import ast
import importlib.util
import json
import pathlib
import re

import pytest

from bcm_jax import errors
from bcm_jax.editing import pretrained
from bcm_jax.editing import tasks
from tests import docs_check
from tests import mutations
from tests import test_golden_texts

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    p for p in (
        *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "launch/README.md"
    )
    # These name what no longer exists.
    if p.name not in ("renames.md", "CHANGELOG.md")
)
# The example in this section of methods.md creates the files that it names.
EXAMPLE = re.compile(r"^## Adding a method\n.*?(?=^## )", re.DOTALL | re.M)
TEXTS = {p: EXAMPLE.sub("", p.read_text(encoding="utf-8")) for p in PAGES}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda p: str(p.relative_to(ROOT))
)


def config_keys():
  """Returns every 'section.key' of the shipped configs, resolved."""
  files = (ROOT / "tests/goldens/texts/configs").glob("*.txt")
  lines = [line for f in files for line in f.read_text().splitlines()]
  return {line.partition(" = ")[0].lstrip("+- ") for line in lines}


@pytest.mark.parametrize("page", docs_check.PAGES, ids=lambda p: p.stem)
def test_line_numbers_of_quoted_code(page):
  text = page.read_text(encoding="utf-8")
  assert docs_check.renumber(text) == text
  shifted = re.sub(r"(\.py):(\d+)`", r"\1:1\2`", text)
  assert docs_check.renumber(shifted) == text != shifted
  with pytest.raises(ValueError, match="expected one"):
    docs_check.renumber(text.replace("self, ", "no such code"))


@every_page
def test_links(page):
  prose = re.sub(r"`[^`]*`", "code", FENCED.sub("", TEXTS[page]))
  for target in re.findall(r"\]\(\s*([^)#\s]+)", prose):
    if "://" not in target:
      assert (page.parent / target).exists(), target


@every_page
def test_commands_and_files_exist(page):
  for module in re.findall(r"python -m ([\w.]+)", TEXTS[page]):
    assert importlib.util.find_spec(module), module
  for path in re.findall(
      r"(?<![\w/-])(?:bcm_jax|benchmarks|launch|tests)/[\w/]+\.\w+", TEXTS[page]
  ):
    assert (ROOT / path).exists(), path
  known = list(test_golden_texts.all_variants())
  known += [name.partition(":")[0] for name in known]
  for config in re.findall(r"configs/([\w.]+\.py(?::\w+)?)", TEXTS[page]):
    assert config in known, config


@every_page
def test_config_keys(page):
  known = config_keys()
  sections = {key.partition(".")[0] for key in known}
  found = set(re.findall(r"--config\.(\w+\.\w+)=", TEXTS[page]))
  # `model.sample` is Python, and `train.py` a file.
  found |= {
      f"{section}.{key}"
      for section, key in re.findall(r"`(\w+)\.(\w+)[`=]", TEXTS[page])
      if section in sections - {"model"} and key not in ("py", "md", "json")
  }
  assert not found - known - {"section.key"}


def python_of(page):
  """Returns the Python examples of a page, or the cells of a notebook."""
  if page.suffix == ".md":
    return [c for kind, c in FENCED.findall(TEXTS[page]) if kind == "python"]
  cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
  cells = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
  return ["\n".join(cells)]


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("launch/colab/*.ipynb")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_python_examples(page):
  for code in python_of(page):
    tree, names = ast.parse(code), {}
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module[:7] == "bcm_jax":
        exec(ast.unparse(node), names)
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = names.get(node.value.id)
        assert owner is None or hasattr(owner, node.attr), node.attr
      if isinstance(node, ast.Call) and "bcm_jax.load" in code:
        called = re.fullmatch(r"model\.(\w+)", ast.unparse(node.func))
        assert not called or hasattr(pretrained.Model, called[1]), called[1]


def test_the_training_example_resolves():
  (code,) = [c for _, c in FENCED.findall(TEXTS[ROOT / "README.md"])
             if "train_and_evaluate" in c]
  *first, last = ast.parse(code).body
  names = {}
  exec(ast.unparse(ast.Module(first, [])), names)
  assert names["config"].training.num_steps == 200
  assert "train.train_and_evaluate(config" in ast.unparse(last)


def test_results_of_the_readme():
  text = TEXTS[ROOT / "README.md"]
  rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \| (.*) \|$", text, re.M)
  assert len(rows) == 6
  for name, sampler, nfe, cells in rows:
    (path,) = (ROOT / "docs/results/methods_digits").glob(f"{name}*.json")
    result = json.loads(path.read_text())
    numbers = result["samplers"][f"{sampler}_nfe{nfe}"]
    fid = "FD (digits ResNet)"
    assert cells == (
        f"{numbers[fid]:.3f} ± {numbers['std'][fid]:.3f} | "
        f"{numbers['class_accuracy']:.1%} | {numbers['precision']:.2f} | "
        f"{numbers['recall']:.2f}"
    )
    assert result["protocol"]["seeds"] == [0, 1, 2]
  inversion = json.loads((ROOT / "docs/results/digits.json").read_text())
  for nfe in (1, 2):
    mse = inversion["inversion"][f"nfe{nfe}"]["mse"]
    assert f"{mse:.4f} with {nfe}" in " ".join(text.split())
  cost = json.loads((ROOT / "docs/results/step_cost_digits.json").read_text())
  assert f"{cost['methods']['bcm']['ratio']:.1f} times as long" in text


def test_tables_of_the_scale_page():
  text = TEXTS[ROOT / "docs" / "scale.md"]
  for row in docs_check.scale_rows():
    assert row in text, row


@pytest.mark.parametrize("name", ["methods_digits", "editing"])
def test_generated_tables(name):
  benchmark = docs_check.benchmark(name)
  text = benchmark.PAGE.read_text(encoding="utf-8")
  assert benchmark.page(text) == text
  assert benchmark.MARKED.search(text)


def test_methods_are_compared_by_means_over_seeds(monkeypatch, tmp_path):
  benchmark = docs_check.benchmark("methods_digits")
  monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
  monkeypatch.setattr(benchmark, "COST", tmp_path / "cost.json")
  assert benchmark.table() == "Not run yet."
  for name, fid in (("edm", 2.0), ("dmd2-seed0", 2.0), ("dmd2-seed1", 3.0),
                    ("dmd2-seed2", 4.0)):
    numbers = {"nfe": 1, "FD (digits ResNet)": fid, "class_accuracy": 0.9,
               "precision": 0.8, "recall": 0.7}
    spread = {"std": dict.fromkeys(numbers, 0.25)}
    (tmp_path / f"{name}.json").write_text(json.dumps({
        "samplers": {"onestep_nfe1": numbers | spread},
        "training": {"images": 64_000, "seconds": 90},
    }))
  table = benchmark.table()
  one = "| onestep | 1 | {} | {} | 90.0% | 0.80 | 0.70 | 64,000 | 1.5 | {} |"
  assert "| `edm` " + one.format("2.000 ± 0.250", "1.00", 1) in table
  assert "| `dmd2` " + one.format("3.000 ± 1.000", "1.50", 3) in table


def test_constants_of_the_editing_tasks():
  text = TEXTS[ROOT / "docs" / "editing.md"].partition("## Results")[0]
  for name, task in tasks.TASKS.items():
    (row,) = [r for r in text.splitlines() if r.startswith(f"| `{name}` |")]
    if task.noise and name != "inpaint":
      assert f"e = {task.noise:g}" in row
    if task.level:
      assert f"level {task.level:g}" in row


def test_guarantees_have_tests_and_each_a_fast_one():
  text = TEXTS[ROOT / "docs" / "reliability.md"]
  fast = text.partition("## Fast tests")[2].partition("\n## ")[0]
  for table in (text.partition("## Fast tests")[0], fast):
    rows = re.findall(r"^\| (\d+) \|.*tests/.*$", table, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 11))
  for file, name in docs_check.named_tests(text):
    if name:
      docs_check.marks(file, name)
    else:
      assert (ROOT / file).is_file(), file
  for file, name in docs_check.named_tests(fast):
    for mark in docs_check.marks(file, name).splitlines():
      assert mark != "pytest.mark.slow", f"{file}::{name}"


def test_exit_statuses():
  for status in (errors.EXIT_BAD_INPUT, errors.EXIT_HANGING,
                 errors.EXIT_MACHINE, errors.EXIT_PREEMPTED):
    assert f"\n| {status} | " in TEXTS[ROOT / "docs" / "reliability.md"]


def test_mutations_fit_the_code_the_tests_and_their_page():
  for mutation in mutations.MUTATIONS:
    path = ROOT / "bcm_jax" / mutation.file
    code = path.read_text(encoding="utf-8")
    assert code.count(mutation.old) == 1, mutation.name
    ast.parse(code.replace(mutation.old, mutation.new))
    file, _, name = mutation.test.partition("::")
    if name:
      docs_check.marks(f"tests/{file}", name.partition("[")[0])
  page = (ROOT / "tests" / "mutations.md").read_text(encoding="utf-8")
  found = re.findall(r"^\| (.*?) \| `(.*)` \|$", page, re.MULTILINE)
  assert found == [(m.name, m.test) for m in mutations.MUTATIONS]
