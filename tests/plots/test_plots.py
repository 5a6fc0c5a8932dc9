"""Figures: the numbers behind them, what is missing, and the PNGs."""

import json

from matplotlib import text
import numpy as np
from PIL import Image
import pytest

from bcm_jax import errors
from bcm_jax.plots import draw
from bcm_jax.plots import figures
from bcm_jax.plots import records

# Runs written by hand ---------------------------------------------------------


def run_at(folder) -> records.Run:
  return records.open_runs([str(folder)])[0]


def write_metrics(folder, *lines) -> None:
  folder.mkdir(exist_ok=True)
  text = (x if isinstance(x, str) else json.dumps(x) for x in lines)
  (folder / "metrics.jsonl").write_text("\n".join(text))


def numbers(nfe, value, std=None, distance="FD (pixels)") -> dict:
  values = {distance: value, "precision": 0.5, "recall": 0.4}
  return {"nfe": nfe, **values, "std": dict.fromkeys(values, std)}


def write_result(folder, samplers, inversion=None, name=None, **changed):
  """A result as mode eval writes it; `changed` are facts of its protocol."""
  facts = {
      "data": "digits", "method": "bcm", "samples": 100, "seeds": [0],
      "features": "pixels", "features_digest": "aa", "reference_digest": "bb",
      "num_real_for_prdc": 50, "neighbors_k": 3,
  }
  step, average = changed.pop("step", 8), changed.pop("average", "ema")
  (folder / "eval").mkdir(parents=True, exist_ok=True)
  (folder / "eval" / f"{name or step}.json").write_text(json.dumps({
      "step": step, "average": average, "samplers": samplers,
      "inversion": inversion or {}, "protocol": facts | changed,
  }))


def errors_at(*noises, nfe=1) -> dict:
  return {
      f"nfe{nfe}_noise{e}": {"nfe": nfe, "noise": e, "mse": 0.1 * nfe * e}
      for e in noises
  }


@pytest.fixture
def full(tmp_path):
  """A work directory with something for every figure but the trajectory."""
  folder = tmp_path / "full"
  write_metrics(folder, *({"step": i, "loss": 1 / i} for i in range(1, 60)))
  write_result(
      folder, {"onestep_nfe1": numbers(1, 3.0, 0.1),
               "ancestral_nfe2": numbers(2, 2.0, 0.2)},
      errors_at(0.1, 0.2),
  )
  random = np.random.default_rng(0)
  pictures = random.integers(0, 256, (3, 4, 8, 8, 1), np.uint8)
  (folder / "inversions" / "nfe2").mkdir(parents=True)
  np.savez(
      folder / "inversions" / "nfe2" / "inversion.npz", mse=np.ones(4) / 50,
      originals=pictures[0], reconstructions=pictures[1],
      latents=random.standard_normal((4, 8, 8, 1)) * 40,
  )
  (folder / "edits" / "interpolate").mkdir(parents=True)
  np.savez(
      folder / "edits" / "interpolate" / "interpolation.npz", images=pictures,
      labels=np.array([[1, 2], [3, 4], [5, 6]]),
  )
  return folder


@pytest.fixture
def drawn(monkeypatch):
  """Pictures that would have been saved."""
  pictures = []
  monkeypatch.setattr(figures, "save", lambda p, path: pictures.append(p))
  return pictures


def colors(path) -> int:
  with Image.open(path) as picture:
    assert min(picture.size) > 200
    return len(picture.convert("RGB").getcolors(1 << 24))


def test_names_tell_runs_apart_and_each_counts_once(tmp_path):
  places = [tmp_path / "a" / "edm", tmp_path / "b" / "edm", tmp_path / "c"]
  for place in places:
    place.mkdir(parents=True)
  (tmp_path / "r.v2.json").write_text("{}")
  given = [*map(str, places), str(tmp_path / "r.v2.json")]
  found = records.open_runs([*given, str(tmp_path / "b" / ".." / "c")])
  assert [r.label.split("/")[-2:] for r in found[:2]] == [
      ["a", "edm"], ["b", "edm"]
  ]
  assert len(found) == 4
  alone = records.open_runs(given[1:])
  assert [r.label for r in alone] == ["edm", "c", "r.v2"]


@pytest.mark.parametrize("place", ["none", "none.json"])
def test_places_that_hold_no_run(tmp_path, place):
  with pytest.raises(errors.UserError, match=str(place)):
    records.open_runs([str(tmp_path / place)])


# Training curves --------------------------------------------------------------


def test_steps_done_again_after_a_roll_back_replace_the_old_ones(tmp_path):
  write_metrics(
      tmp_path,
      {"step": 10, "loss": 1.0}, {"step": 15, "steps_per_sec": 7.0},
      {"step": 20, "loss": 2.0}, {"step": 30, "loss": 3.0},
      {"step": 35, "steps_per_sec": 8.0}, {"step": 40, "loss": "NaN"},
      # Back to 15; the run ended before it came to 40 again.
      {"step": 20, "loss": 5.0}, {"step": 30, "loss": 6.0},
      {"step": 30, "loss": 7.0},
  )
  found = records.scalars(run_at(tmp_path))
  steps, values = found["student", "loss"]
  assert list(steps) == [10, 20, 30] and list(values) == [1.0, 5.0, 7.0]
  assert list(found["student", "steps_per_sec"][0]) == [15, 35]


def test_what_is_no_curve_is_left_out(tmp_path):
  write_metrics(
      tmp_path, {"kind": "hparams", "hparams": {"loss": 3}},
      {"step": 1, "kind": "texts", "texts": {}}, "[]", "nonsense",
      {"step": 1, "student/loss": 1.0, "fake_score/loss": 2.0, "skipped": 0.0,
       "skipped_in_row": 1.0, "uptime": 3.0},
      {"step": 2, "student/loss": "NaN", "fake_score/loss": "Infinity",
       "skipped": 0.0},
      '{"step": 3, "student/lo',
  )
  found = records.scalars(run_at(tmp_path))
  assert set(found) == {("student", "loss"), ("fake_score", "loss")}
  np.testing.assert_array_equal(found["student", "loss"][1], [1, np.nan])
  assert found["fake_score", "loss"][1][1] == np.inf


def test_smoothing_is_a_mean_of_neighbours():
  values = np.random.default_rng(0).standard_normal(101)
  smooth = records.smooth(values, 4)
  np.testing.assert_allclose(smooth[50], values[46:55].mean())
  np.testing.assert_allclose(smooth[0], values[:5].mean())
  np.testing.assert_allclose(smooth[-1], values[-5:].mean())
  np.testing.assert_allclose(records.smooth(values, 0), values, atol=1e-12)
  line = np.arange(30.0)
  np.testing.assert_allclose(records.smooth(line, 3)[3:-3], line[3:-3])


def test_smoothing_steps_over_what_is_not_finite():
  values = np.array([1, np.nan, np.inf, 1, 1, np.nan, np.nan, np.nan])
  smooth = records.smooth(values, 1)
  np.testing.assert_array_equal(smooth, [1, 1, 1, 1, 1, 1, np.nan, np.nan])


def test_runs_share_panels_by_network_and_metric(tmp_path, drawn):
  write_metrics(tmp_path / "one", {"step": 1, "loss": 1.0, "loss_ct": 2.0})
  write_metrics(
      tmp_path / "two", {"step": 1, "student/loss": 3.0, "critic/loss": 4.0}
  )
  found = {
      name: records.scalars(run_at(tmp_path / name))
      for name in ("one", "two")
  }
  figures.curves(found, "x.png")
  panels = {a.get_title(): a for a in drawn[0].axes if a.get_title()}
  assert list(panels) == ["loss", "loss_ct", "loss, critic"]
  # Each curve is drawn faint and smoothed.
  values = [[float(line.get_ydata()[0]) for line in a.lines]
            for a in panels.values()]
  assert values == [[1, 1, 3, 3], [2, 2], [4, 4]]
  legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
  assert legend == ["one", "two"]


def test_more_runs_than_colors_take_other_lines():
  found = figures.styles(map(str, range(20)))
  assert len({tuple(s.values()) for s in found.values()}) == 20


def test_figures_fit_a_paper(tmp_path, full, drawn):
  runs = {}
  for i in range(6):
    write_metrics(
        tmp_path / f"r{i}",
        *({"step": s, "loss": i + 10 / s, "lr": 1e-4} for s in range(1, 9)),
    )
    write_result(
        tmp_path / f"r{i}",
        {"heun_nfe7": numbers(7, 30.0 + i, 0.5), "heun_nfe35": numbers(35, 2)},
        errors_at(0.1, 0.2, nfe=i + 1),
    )
    runs[f"r{i}"] = run_at(tmp_path / f"r{i}")
  for read, plot, width in (
      (records.scalars, figures.curves, 4.5),
      (records.quality, figures.quality, figures.PAGE),
      (records.inversions, figures.all_inversions, figures.COLUMN),
  ):
    plot({name: read(run) for name, run in runs.items()}, "x.png")
    assert drawn[-1].get_size_inches()[0] == pytest.approx(width)
  one = records.Run("full", str(full))
  for read in (records.reconstruction, records.interpolation):
    figures.image_rows({"full": read(one)}, "x.png")
    assert (figures.COLUMN <= drawn[-1].get_size_inches()[0] <= figures.PAGE)
  for figure in drawn:
    sizes = {t.get_fontsize() for t in figure.findobj(text.Text)}
    assert 7 <= min(sizes) and max(sizes) <= 8
  lines = drawn[2].axes[0].lines
  for looks in ("get_color", "get_marker"):
    assert len({getattr(line, looks)() for line in lines}) == 6
  assert len({line.get_linestyle() for line in lines}) == 4
  loss, distance = drawn[0].axes[0], drawn[1].subfigs[0].axes[0]
  for axis in (loss, distance, drawn[2].axes[0]):
    assert axis.get_yscale() == "log"
    low, high = axis.get_ylim()
    # At least two numbers, without powers.
    labels = [
        label.get_text() for minor in (False, True)
        for at, label in zip(axis.get_yticks(minor=minor),
                             axis.get_yticklabels(minor=minor), strict=True)
        if low <= at <= high and label.get_text()
    ]
    assert len(labels) >= 2 and not any("$" in label for label in labels)


def test_files_of_every_format(full, tmp_path, capsys):
  out = tmp_path / "out"
  draw.main([
      str(full), "--only=inversion", f"--out={out}", "--formats=png,pdf,svg"
  ])
  first = {p.suffix: p.read_bytes()[:5] for p in out.iterdir()}
  assert first == {".png": b"\x89PNG\r", ".pdf": b"%PDF-", ".svg": b"<?xml"}
  # Text stays text.
  assert "reconstruction MSE" in (out / "inversion.svg").read_text()
  with Image.open(out / "inversion.png") as picture:
    assert picture.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
    assert picture.width == 975


# Results ----------------------------------------------------------------------


def test_the_newest_step_counts_with_each_of_its_averages(tmp_path):
  samplers = {"onestep_nfe1": numbers(1, 3.0)}
  write_result(tmp_path, samplers, step=90)
  write_result(tmp_path, samplers, step=100, average="a", name="100_a")
  write_result(tmp_path, samplers, step=100, average="b", name="100_b")
  (tmp_path / "eval" / "other.json").write_text("[1]")
  found = records.results(run_at(tmp_path))
  assert [(r["step"], r["average"]) for r in found] == [(100, "a"), (100, "b")]
  names = {c.label for c in records.quality(run_at(tmp_path))}
  assert {n.rpartition(", ")[2] for n in names} == {"a", "b"}
  one = records.Run("r", str(tmp_path / "eval" / "90.json"))
  assert records.results(one)[0]["step"] == 90


def test_families_over_nfe_start_with_one_step(tmp_path):
  write_result(tmp_path, {
      "ancestral_nfe4": numbers(4, 1.0, 0.3), "onestep_nfe1": numbers(1, 3.0),
      "ancestral_nfe2@0.7": numbers(2, 2.0, 0.2),
      "cm_multistep_nfe2": numbers(2, 2.5), "heun_nfe7": numbers(7, 0.5),
      "heun_churn_nfe7": numbers(7, None),
  })
  curves = records.quality(run_at(tmp_path))
  points = {c.family: c.points for c in curves if c.metric == "FD (pixels)"}
  assert points == {
      "ancestral": [(1, 3.0, None), (2, 2.0, 0.2), (4, 1.0, 0.3)],
      "cm_multistep": [(1, 3.0, None), (2, 2.5, None)],
      "heun": [(7, 0.5, None)],
  }
  assert {c.metric for c in curves} == {"FD (pixels)", "precision", "recall"}


def test_one_step_alone_is_a_family(tmp_path):
  write_result(tmp_path, {"onestep_nfe1": numbers(1, 3.0, distance="FID")})
  curves = records.quality(run_at(tmp_path))
  assert [(c.family, c.metric) for c in curves] == [
      ("onestep", m) for m in ("FID", "precision", "recall")
  ]


@pytest.mark.parametrize("changed", [
    {"features_digest": "cc"}, {"reference_digest": "cc"}, {"samples": 50_000},
    {"neighbors_k": 5}, {"data": "cifar10"},
])
def test_what_cannot_be_compared_is_drawn_apart(tmp_path, drawn, changed):
  samplers = {"onestep_nfe1": numbers(1, 3.0), "heun_nfe7": numbers(7, 1.0)}
  for name, facts in (("a", {}), ("b", {}), ("c", changed)):
    write_result(tmp_path / name, samplers, **facts)
  found = {
      name: records.quality(run_at(tmp_path / name)) for name in "abc"
  }
  figures.quality(found, "x.png")
  rows = drawn[0].subfigs
  assert [len(row.axes) for row in rows] == [3, 3]
  assert [[len(a.containers) for a in row.axes] for row in rows] == [
      [4, 4, 4], [2, 2, 2]
  ]
  titles = [row.get_suptitle() for row in rows]
  if "neighbors_k" not in changed:
    assert titles[0] != titles[1]
  for row, names in zip(rows, ("ab", "c"), strict=True):
    texts = [text.get_text() for text in row.legends[0].get_texts()]
    assert texts == [
        f"{n} (bcm): {f}" for n in names for f in ("onestep", "heun")
    ]


def test_the_spread_over_seeds_is_drawn_as_bars(tmp_path, drawn):
  write_result(tmp_path, {
      "heun_nfe7": numbers(7, 3.0, 0.25), "heun_nfe15": numbers(15, 1.0)
  })
  figures.quality({"a": records.quality(run_at(tmp_path))}, "x.png")
  (row,) = drawn[0].subfigs
  ((_, _, (bars,)),) = row.axes[0].containers
  np.testing.assert_allclose(bars.get_segments()[0], [[7, 2.75], [7, 3.25]])
  assert not np.size(bars.get_segments()[1])
  assert row.get_suptitle().endswith("bars: standard deviation over seeds")
  assert row.axes[0].get_xscale() == "log"


def test_inversions_of_several_runs_share_a_panel_a_data_set(tmp_path, drawn):
  write_result(tmp_path / "bcm", {}, errors_at(0.3, 0.1, 0.2))
  write_result(
      tmp_path / "b", {},
      errors_at(0.1, 0.2) | {"d": {
          "nfe": 4, "noise": 0.1, "mse": 0.5, "solver": "DDIM"
      }}, method="x",
  )
  write_result(tmp_path / "c", {}, errors_at(0.1, 0.2, nfe=2), data="cifar10")
  found = {
      name: records.inversions(run_at(tmp_path / name))
      for name in ("bcm", "b", "c")
  }
  assert found["bcm"]["digits"]["bcm: network, NFE 1"] == [
      pytest.approx((e, 0.1 * e)) for e in (0.1, 0.2, 0.3)
  ]
  figures.all_inversions(found, "x.png")
  panels = {
      a.get_title(): [line.get_label() for line in a.lines]
      for a in drawn[0].axes
  }
  assert panels == {
      "digits": ["bcm: network, NFE 1", "b (x): DDIM, NFE 4",
                 "b (x): network, NFE 1"],
      "cifar10": ["c (bcm): network, NFE 2"],
  }


def test_one_initial_noise_is_no_curve(tmp_path):
  write_result(tmp_path, {}, errors_at(0.07))
  with pytest.raises(errors.UserError, match="0.07"):
    records.inversions(run_at(tmp_path))


# Images -----------------------------------------------------------------------


def test_interpolations_have_their_weight_on_the_axis(full):
  (rows,) = records.interpolation(run_at(full))
  assert rows.columns == ["real", "0", "1", "real"]
  assert rows.rows == ["1 to 2", "3 to 4", "5 to 6"]
  assert rows.images.shape == (3, 4, 8, 8, 1)


def test_reconstructions_stand_below_their_originals(full):
  (rows,) = records.reconstruction(run_at(full))
  with np.load(full / "inversions" / "nfe2" / "inversion.npz") as arrays:
    np.testing.assert_array_equal(rows.images[0], arrays["originals"])
    np.testing.assert_array_equal(rows.images[2], arrays["reconstructions"])
  assert "MSE 0.0200 over 4 test images" in rows.title
  assert rows.columns == [".0200"] * 4
  # Noise of any strength is seen.
  assert 40 < rows.images[1].std() < 80


# The command ------------------------------------------------------------------


def fails(capsys, *arguments) -> str:
  """Runs a command that must fail on bad input; returns its one line."""
  with pytest.raises(SystemExit) as done:
    draw.main(list(arguments))
  assert done.value.code == errors.EXIT_BAD_INPUT
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  return line


@pytest.mark.slow
def test_every_figure_is_made_that_there_is_something_for(
    full, tmp_path, capsys
):
  (tmp_path / "empty").mkdir()
  out = tmp_path / "figures"
  draw.main([str(full), str(tmp_path / "empty"), f"--out={out}"])
  lines = capsys.readouterr().out.splitlines()
  written = [x.removeprefix("written: ") for x in lines if "written: " in x]
  assert [p.removeprefix(f"{out}/") for p in written] == [
      "curves.png", "quality.png", "inversion.png", "reconstruction_full.png",
      "interpolation_full.png",
  ]
  assert sorted(written) == sorted(map(str, out.iterdir()))
  for path in written:
    assert colors(path) > 10
  # One line for all that is not there.
  missing = [x.partition(": ")[0] for x in lines if " skipped: " in x]
  assert missing == [
      *(f"{kind} of empty skipped" for kind in list(draw.KINDS)[:-1]),
      "trajectory of full skipped", "trajectory of empty skipped",
  ]
  assert len(lines) == len(written) + len(missing)


def test_nothing_to_draw_is_bad_input(tmp_path, capsys):
  write_result(tmp_path / "a", {})
  line = fails(capsys, str(tmp_path / "a"), "--only=quality,curves")
  assert "no data to draw" in line


def test_files_of_another_form_are_told_and_the_others_drawn(
    full, tmp_path, capsys
):
  (tmp_path / "other" / "eval").mkdir(parents=True)
  (tmp_path / "other" / "eval" / "1.json").write_text('{"samplers": {}}')
  rows = tmp_path / "other" / "edits" / "interpolate"
  rows.mkdir(parents=True)
  np.savez(rows / "interpolation.npz", something=np.zeros(3))
  out = tmp_path / "out"
  draw.main([
      str(full), str(tmp_path / "other"), "--only=quality,interpolation",
      f"--out={out}",
  ])
  assert (out / "quality.png").exists()
  told = capsys.readouterr().out
  assert "other: has no results" in told
  assert "interpolation.npz: corrupt file" in told


def test_a_result_file_is_a_run_of_numbers_alone(full, capsys):
  draw.main([str(full / "eval" / "8.json")])
  assert {p.name for p in (full / "eval" / "plots").iterdir()} == {
      "quality.png", "inversion.png"
  }
  assert "is a result file" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["--only=curve"], "'curves'"),
    (["--formats=jpg"], "pdf, png, svg"),
    (["--out=/proc/none"], "/proc/none"),
    (["--ot=x"], "--help"),
])
def test_bad_flags(full, flags, said, capsys):
  assert said in fails(capsys, str(full), *flags)


@pytest.mark.parametrize("file, only", [
    ("eval/8.json", "quality"),
    ("inversions/nfe2/inversion.npz", "reconstruction"),
    ("edits/interpolate/interpolation.npz", "interpolation"),
])
def test_damaged_files_are_named(full, file, only, capsys):
  (full / file).write_bytes(b"PK\x03\x04 half of a file")
  with pytest.raises(SystemExit):
    draw.main([str(full), f"--only={only}"])
  assert file in capsys.readouterr().out
