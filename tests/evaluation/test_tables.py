"""docs/results.md out of result files."""

import json

import pytest

from bcm_jax import errors
from bcm_jax.evaluation import published
from bcm_jax.evaluation import tables


def result(data="cifar10", fid=3.0, samples=50_000, method="bcm", **numbers):
  """A result file of one sampler in one and one inversion."""
  protocol = {
      "data": data, "method": method, "samples": samples, "seeds": [0, 1],
      "features": "Inception", "features_digest": "f" * 12,
      "reference_images": 50_000, "reference_digest": "e" * 12,
      "num_real_for_prdc": 10_000, "neighbors_k": 3,
      "config_digest": "c" * 12, "commit": "abc", "hardware": "a laptop",
  }
  if samples < 50_000:
    protocol["few_samples"] = f"{samples} of the protocol's 50000"
  values = {"FID": fid} | numbers
  return {
      "step": 7, "average": "ema_0.9999",
      "samplers": {"ancestral_nfe2": {
          "plan": [], "nfe": 2, **values, "std": dict.fromkeys(values, 0.25),
      }},
      "inversion": {"nfe1": {"nfe": 1, "noise": 0.07, "mse": 0.0051}},
      "protocol": protocol,
  }


def row_of(page, *cells):
  """The only line of a page that holds all these cells."""
  found = [
      line for line in page.splitlines()
      if all(f"| {c} |" in line for c in cells)
  ]
  assert len(found) == 1, found
  return found[0]


def test_published_numbers_stand_beside_ours():
  page = tables.render({"mine": result(method="ict")})
  assert row_of(page, "iCT", "2", "2.46").endswith("| 3.00 ± 0.25 (`mine`) |")
  assert row_of(page, "iCT", "1", "2.83").endswith("| not run |")
  assert row_of(page, "BCM", "1", "4.18").endswith("| not run |")
  assert "| `mine` | ancestral | 2 | 3.00 ± 0.25 |" in page
  assert "| `mine` | by the network | 1 | 0.07 | 0.0051 |" in page


def test_numbers_quoted_from_memory_are_not_shown():
  unverified = [r for r in published.ROWS if not r.verified]
  assert unverified
  page = tables.render({"mine": result(method=unverified[0].ours)})
  table = page.partition("## CIFAR-10\n")[2].partition("\n## ")[0]
  assert "| EDM | 35 |" in table
  for row in unverified:
    assert f"| {row.method} | {row.nfe} |" not in table


def test_few_samples_are_marked_and_never_beside_published_numbers():
  page = tables.render({"mine": result(method="ict", samples=5000)})
  assert row_of(page, "iCT", "2", "2.46").endswith("| not run |")
  assert "**Few samples: 5000 of the protocol's 50000.**" in page
  assert "5,000 samples per seed (seeds 0, 1)" in page


def test_another_method_or_data_set_is_not_ours():
  page = tables.render({
      "a": result(method="ict"), "b": result(data="cifar10_jpeg"),
  })
  assert row_of(page, "ECT", "2", "2.11").endswith("| not run |")
  assert row_of(page, "iCT", "2", "2.46").endswith("(`a`) |")
  assert "## CIFAR-10 (JPEG), 32x32" in page
  assert "not with published CIFAR-10 numbers" in page.replace("\n", " ")


def test_columns_are_what_any_run_measured():
  page = tables.render({
      "a": result(data="mine", class_accuracy=0.5),
      "b": result(data="mine", fid=None, precision=0.25)
      | {"inversion": {}},
  })
  assert "## mine" in page
  head = next(x for x in page.splitlines() if x.startswith("| run | sampler"))
  assert head == "| run | sampler | NFE | FID | P | class accuracy |"
  assert "| `b` | ancestral | 2 |  | 0.250 ± 0.250 |  |" in page


def test_aims_stand_below_the_digits():
  page = tables.render({"digits": result(data="digits", class_accuracy=0.5)})
  assert "| target |  | 1 |  | 97.0% |" in page
  assert "| target |  | 1 |  | 0.0080 |" in page


def test_mode_table_reads_a_folder_and_leaves_other_files(tmp_path):
  folder = tmp_path / "results"
  folder.mkdir()
  with pytest.raises(errors.UserError, match=".json"):
    tables.run(str(tmp_path))
  (folder / "mine.json").write_text(json.dumps(result()))
  (folder / "speed.json").write_text(json.dumps({"images a second": 1}))
  tables.run(str(tmp_path))
  page = (tmp_path / "results.md").read_text()
  assert page == tables.render({"mine": result()})
  (folder / "broken.json").write_text("{")
  with pytest.raises(errors.UserError, match="broken.json"):
    tables.run(str(tmp_path))
  assert (tmp_path / "results.md").read_text() == page


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("key, value", [
    ("samples", 10_000), ("features", "pixels"), ("features_digest", "0"),
    ("reference_digest", "0"), ("num_real_for_prdc", 5), ("neighbors_k", 4),
])
def test_protocols_are_never_mixed_in_a_table(key, value):
  other = result(method="ict")
  other["protocol"][key] = value
  page = tables.render({"a": result(), "b": other, "c": result()})
  for head in ("| run | sampler", "| run | inversion"):
    found = [t for t in page.split("\n\n") if t.startswith(head)]
    assert len(found) == 2
    assert ["`a`" in t for t in found] == ["`c`" in t for t in found]
    assert all(("`a`" in t) != ("`b`" in t) for t in found)
  titles = [x for x in page.splitlines() if x.startswith("### ")]
  assert len(set(titles)) == 2


def test_tables_of_runs(tmp_path, capsys):
  write(tmp_path / "runs" / "a" / "config.json", {"sample": {}})
  write(tmp_path / "runs" / "a" / "eval" / "7.json", result())
  write(tmp_path / "runs" / "b" / "eval" / "7.json", result())
  write(tmp_path / "runs" / "b" / "eval" / "7_0123abcd.json", result(fid=4.0))
  write(tmp_path / "one.json", result())
  runs = tmp_path / "runs"
  assert set(tables.read(str(runs / "a"))) == {"a"}
  assert set(tables.read(str(runs))) == {"a", "b/7", "b/7_0123abcd"}
  assert set(tables.read(str(tmp_path / "one.json"))) == {"one"}
  page = tables.run(None, [str(runs / "a"), str(tmp_path / "one.json")])
  assert capsys.readouterr().out == page + "\n"
  assert "| `a` |" in page and "| `one` |" in page
  tables.run(str(runs / "b"))
  assert "`b/7_0123abcd`" in (runs / "b" / "results.md").read_text()
  # Two runs of one name stay apart.
  write(tmp_path / "old" / "a" / "eval" / "7.json", result())
  page = tables.run(None, [str(runs / "a"), str(tmp_path / "old" / "a")])
  assert f"`{tmp_path}/old/a/a`" in page and "| `a` |" in page
  for wrong in (tmp_path / "gone", tmp_path / "runs" / "a" / "config.json"):
    with pytest.raises(errors.UserError, match=wrong.name):
      tables.run(None, [str(wrong)])


def test_results_without_samplers_or_of_files():
  empty = result(data="mine") | {"samplers": {}, "inversion": {}}
  images = result(data="mine") | {"step": None, "average": "theirs.npz"}
  page = tables.render({"empty": empty, "images": images})
  assert "* `images`: theirs.npz; " in page and "step None" not in page
