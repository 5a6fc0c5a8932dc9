"""The runner of reference numbers: what passes, and that the rest fails."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.parity import report
from tests.parity import runner

GOLDENS = pathlib.Path(__file__).parent / "goldens"
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
  """Two small files, under names that tell nothing."""
  for name, new in (("sched_karras", "a"), ("uint8_quantise", "b")):
    shutil.copy(GOLDENS / f"{name}.npz", tmp_path / f"{new}.npz")
  return tmp_path


def change(path, **arrays):
  """Replaces arrays of a file by what functions make of them; None drops."""
  with np.load(path) as file:
    found = {k: file[k] for k in file.files}
  for key, f in arrays.items():
    if f is None:
      del found[key]
    else:
      found[key] = f(found.get(key))
  np.savez(path, **found)


def meta(**entries):
  """A function that changes a file's meta."""
  return lambda old: np.array(json.dumps(json.loads(str(old)) | entries))


def run(capsys, folder, *options):
  """(exit status, lines)."""
  status = runner.main([str(folder), *options])
  return status, capsys.readouterr().out.splitlines()


def test_a_folder_passes(folder):
  done = subprocess.run(
      [sys.executable, "-m", "tests.parity", str(folder)], cwd=ROOT,
      capture_output=True, text=True, check=False,
  )
  lines = done.stdout.splitlines()
  assert done.returncode == 0, done.stderr
  assert lines[-1] == "3 passed, 0 failed"
  assert [line.split()[:3] for line in lines[:-1]] == [
      ["PASS", "a.npz", "float32"], ["PASS", "a.npz", "float64"],
      ["PASS", "b.npz", "exact"],
  ]
  assert "karras_n" in lines[0] and "error/tolerance" in lines[0]


def test_a_changed_output_fails(folder, capsys):
  key = next(k for k in np.load(folder / "a.npz").files if "64/karras_n18" in k)
  change(folder / "a.npz", **{key: lambda v: v * 1.001})
  status, lines = run(capsys, folder)
  assert status == 1 and lines[-1] == "1 passed, 2 failed"
  assert all("karras_n18" in line for line in lines[:2])


def test_the_record_in_float32_counts_too(folder, capsys):
  with np.load(folder / "a.npz") as file:
    key = next(k for k in file.files if "64/karras_n18" in k)
    record = file[key].astype(np.float32)
  single = key.replace("64", "", 1)
  change(folder / "a.npz", **{single: lambda _: record})
  assert run(capsys, folder)[0] == 0
  change(folder / "a.npz", **{single: lambda _: record * np.float32(1.001)})
  status, lines = run(capsys, folder)
  assert status == 1 and lines[-1] == "2 passed, 1 failed"
  assert lines[0].split()[:4] == ["FAIL", "a.npz", "float32", single[4:]]


def test_one_grey_level_fails(folder, capsys):
  def brighter(v):
    v[7] += 1
    return v

  change(folder / "b.npz", **{"out/uint8": brighter})
  status, lines = run(capsys, folder)
  assert status == 1 and lines[-1] == "2 passed, 1 failed"
  assert lines[-2].split()[:3] == ["FAIL", "b.npz", "exact"]


def test_tolerances_are_the_files(folder, capsys):
  tight = json.loads(str(np.load(folder / "a.npz")["meta"]))["f32_vs_f64"]
  for entry in tight.values():
    entry["suggested_rel_to_scale"] = 1e-12
  change(folder / "a.npz", meta=meta(f32_vs_f64=tight))
  status, lines = run(capsys, folder, "--only", "a.")
  assert status == 1 and lines[-1] == "1 passed, 1 failed"
  status, lines = run(capsys, folder, "--only", "a.", "--float64-only")
  assert status == 0 and lines[-1] == "1 passed, 0 failed"


def test_what_nothing_knows_fails(folder, capsys):
  change(folder / "b.npz", meta=meta(source_repo="somebody/else"),
         **{"in/w": lambda _: np.ones(3), "in/v": None})
  status, lines = run(capsys, folder)
  assert status == 1 and lines[-1] == "2 passed, 1 failed"
  assert "no runner knows somebody/else with uint8" in lines[-2]


def test_an_output_that_nothing_computes_fails(folder, capsys):
  change(folder / "b.npz", **{"out/more": lambda _: np.ones(3)})
  status, lines = run(capsys, folder)
  assert status == 1 and lines[-1] == "2 passed, 1 failed"
  assert "outputs that nothing computes: more" in lines[-2]


def test_pending_counts_as_failed(folder, capsys, monkeypatch):
  def later(file, precision):
    yield report.Check("uint8", np.ones(1), np.ones(1), 0)
    yield report.Pending("more", "still to come")

  change(folder / "b.npz", **{"out/more": lambda _: np.ones(3)})
  monkeypatch.setattr(
      runner, "RUNNERS", [runner.Runner(lambda file: True, later)]
  )
  status, lines = run(capsys, folder, "--only", "b.")
  assert status == 1 and lines[-1] == "1 passed, 1 failed"
  assert lines[-2].split() == ["PENDING", "b.npz", "more:", *(
      "still to come".split())]


def test_an_unreadable_file_fails(folder, capsys):
  (folder / "a.npz").write_bytes(b"no archive")
  change(folder / "b.npz", meta=None)
  status, lines = run(capsys, folder)
  assert status == 1 and lines[-1] == "0 passed, 2 failed"
  assert "has no meta" in lines[1]


def test_no_folder_no_files(tmp_path, capsys):
  for place in (tmp_path / "none", tmp_path):
    assert runner.main([str(place)]) == 2
    out, error = capsys.readouterr()
    assert not out and len(error.splitlines()) == 1 and str(place) in error


@pytest.mark.parametrize("actual, limit, expected", [
    (1.5, 1.0, 0.5), (1.0, 0.0, 0.0), (1.1, 0.0, np.inf),
    (np.nan, 1.0, np.inf),
])
def test_ratio(actual, limit, expected):
  check = report.Check("x", np.full(2, actual), np.ones(2), limit)
  assert report.ratio(check) == pytest.approx(expected)


def test_precision_and_shape_are_looked_at():
  one = np.ones(2)
  for actual, words in (
      (one.astype(np.float32), "not computed in float64: x"),
      (one[:1], "x is (1,), expected (2,)"),
  ):
    check = report.Check("x", actual, one, 1.0)
    line = report.compared("f", "float64", [check], [])
    assert not line.passed and words in line.text


OPTIONS = sorted((GOLDENS / "options").glob("*.npz"))


@pytest.mark.parametrize("path", [
    pytest.param(p, marks=[] if "augment" in p.name else pytest.mark.slow)
    for p in OPTIONS
], ids=lambda p: p.stem)
def test_options_of_the_official_constructors(path):
  lines = list(runner.lines(path, None))
  assert lines and all(line.passed for line in lines), lines


@pytest.mark.parametrize("name, option", [
    ("edm2_one_level", {"new_option": 1}), ("edm2_one_level",
    {"resample_filter": [1, 3, 3, 1]}), ("edm_song_options",
    {"model_type": "OtherUNet"}), ("edm_augment_gray", {"cutout": 1}),
])
def test_unknown_options_fail(name, option, tmp_path):
  path = tmp_path / f"{name}.npz"
  shutil.copy(GOLDENS / "options" / f"{name}.npz", path)
  old = json.loads(str(np.load(path)["meta"]))
  change(path, meta=meta(constructor=old["constructor"] | option))
  lines = list(runner.lines(path, None))
  assert not any(line.passed for line in lines)
  assert any(next(iter(option)) in str(line) for line in lines), lines
