"""docs/methods.md says what the committed results say."""

import json

import pytest

from tests import scripts


@pytest.fixture
def benchmark():
  return scripts.benchmark("methods_digits")


def test_the_page_is_what_the_benchmark_writes(benchmark):
  text = benchmark.PAGE.read_text(encoding="utf-8")
  assert benchmark.page(text) == text
  marks = {match[2] for match in benchmark.MARKED.finditer(text)}
  assert marks == {"table", "expectations", *benchmark.RUNS}


def write(folder, name, fid, std=0.25):
  numbers = {"nfe": 1, "FD (digits ResNet)": fid, "class_accuracy": 0.9,
             "precision": 0.8, "recall": 0.7}
  result = {
      "samplers": {"onestep_nfe1": numbers
                   | {"std": dict.fromkeys(numbers, std)}},
      "training": {"images": 64_000, "seconds": 90},
  }
  (folder / f"{name}.json").write_text(json.dumps(result))


def test_rows_are_means_over_seeds_and_told_beside_the_teachers(
    benchmark, monkeypatch, tmp_path
):
  monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
  monkeypatch.setattr(benchmark, "COST", tmp_path / "cost.json")
  assert benchmark.table() == "Not run yet."
  write(tmp_path, "edm", 2.0)
  for seed, fid in enumerate((2.0, 3.0, 4.0)):
    write(tmp_path, f"dmd2-seed{seed}", fid)
    write(tmp_path, f"dmd2_no_gan-seed{seed}", 10.0)
  table = benchmark.table()
  one = "| onestep | 1 | {} | {} | 90.0% | 0.80 | 0.70 | 64,000 | 1.5 | {} |"
  assert "| `edm` " + one.format("2.000 ± 0.250", "1.00", 1) in table
  assert "| `dmd2` " + one.format("3.000 ± 1.000", "1.50", 3) in table
  assert "| `dmd2_no_gan` " + one.format("10.000 ± 0.000", "5.00", 3) in table
  assert "relative to iCT: not run." in benchmark.sentence("dmd2")
  (tmp_path / "cost.json").write_text('{"methods": {"dmd2": {"ratio": 2.5}}}')
  said = benchmark.sentence("dmd2")
  assert "FD (digits ResNet): 3.000 ± 1.000 with 1 NFE (onestep)" in said
  assert "(n = 3). Step time relative to iCT: 2.50." in said
  assert "DMD2 on imagenet64 1.28 with 1 NFE (Lu & Song" in said


def with_steps(folder, name, *fids, std=0.1):
  """A result of one step and of more, by both samplers."""
  write(folder, name, fids[0], std)
  path = folder / f"{name}.json"
  result = json.loads(path.read_text())
  one = result["samplers"]["onestep_nfe1"]
  for nfe, fid in enumerate(fids[1:], 2):
    for sampler in ("ancestral", "cm_multistep"):
      result["samplers"][f"{sampler}_nfe{nfe}"] = one | {
          "nfe": nfe, "FD (digits ResNet)": fid
      }
  path.write_text(json.dumps(result))


def test_expectations_are_checked_beyond_the_spreads(
    benchmark, monkeypatch, tmp_path
):
  monkeypatch.setattr(benchmark, "RESULTS", tmp_path)

  def answers():
    text = benchmark.expectations().replace("\n  ", " ")
    return [line.rpartition(", ")[2] for line in text.splitlines()]

  assert [line.rpartition(": ")[2] for line in answers()] == ["not run"] * 6
  write(tmp_path, "edm", 2.0)
  with_steps(tmp_path, "cd", 3.1, 3.2, 3.5)
  with_steps(tmp_path, "ctm", 3.0, 2.5, 3.1)
  write(tmp_path, "dmd2", 1.0, 0.1)
  write(tmp_path, "dmd2_no_gan", 1.15, 0.1)
  assert answers() == ["no", "yes", "yes", "yes", "yes", "no"]
  with_steps(tmp_path, "cd", 2.9, 3.5, 3.0)
  with_steps(tmp_path, "ctm", 2.0, 2.1, 2.5)
  write(tmp_path, "dmd2_no_gan", 1.25, 0.1)
  assert answers() == ["yes", "yes", "yes", "no", "no", "yes"]
