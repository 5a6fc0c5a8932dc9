"""docs/scale.md says what the committed measurements say."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
# Report -> what the page calls its config.
COMPILED = {
    "cifar10_v4": "cifar10.py", "cifar10_v5e": "cifar10.py",
    "cifar10_v6e": "cifar10.py",
    "imagenet64_v5e_16": "imagenet64.py",
    "imagenet64_v5e_256": "imagenet64.py",
}
STEP_TIMES = {"digits": "digits.py", "cifar10_jpeg": "cifar10_jpeg.py"}
GIB = 2**30


def read(name):
  path = ROOT / "docs" / "results" / f"{name}.json"
  return json.loads(path.read_text(encoding="utf-8"))


def compiled(name):
  """(report, its only phase)."""
  report = read(f"compile_{name}")
  (phase,) = report["phases"].values()
  return report, phase


def report_row(name):
  report, phase = compiled(name)
  used = phase["bytes"]["peak"] / GIB
  reduced = phase["collectives"]["all-reduce"]["bytes"]
  return (
      f"| {COMPILED[name]} | {report['topology']} | {report['chips']} | "
      f"{report['examples_per_chip']} | {used:.1f} of {report['hbm_gib']:.1f} "
      f"({100 * phase['of_hbm']:.0f}%) | {phase['flops'] / 1e12:.1f} | "
      f"{phase['bytes_moved'] / 1e9:.0f} | {reduced / 1e6:.0f} | "
      f"{phase['roofline_ms']['bound']:.0f} | "
      f"{phase['seconds']['compile']:.0f} |"
  )


def step_rows(name):
  result = read(f"step_time_{name}")
  for backend, r in result["backends"].items():
    yield (
        f"| {STEP_TIMES[name]} | {backend} | {r['ms_per_step']:.0f} | "
        f"{r['images_per_second']:.0f} | {100 * r['mfu']:.0f}% | "
        f"{100 * r['data_wait_share']:.1f}% | {r['compile_seconds']:.0f} |"
    )


def scaling_row(name):
  one = read(f"scaling_{name}")["scaling"][-1]
  reduced = one["collectives"]["all-reduce"]["bytes"]
  return (
      f"| {STEP_TIMES[name]} | {one['flops'] / 1e9:.2f} | "
      f"{one['bytes_moved'] / 1e6:.0f} | {reduced / 1e6:.2f} |"
  )


@pytest.mark.parametrize("name", COMPILED)
def test_reports_are_on_the_page(name):
  assert report_row(name) in PAGE


@pytest.mark.parametrize("name", STEP_TIMES)
def test_step_times_are_on_the_page(name):
  for row in (*step_rows(name), scaling_row(name)):
    assert row in PAGE


@pytest.mark.parametrize("name", COMPILED)
def test_the_large_configs_fit(name):
  _, phase = compiled(name)
  assert phase["of_hbm"] <= 0.9


def test_a_pod_of_256_costs_a_chip_what_16_do():
  (small, few), (large, many) = (
      compiled(f"imagenet64_v5e_{n}") for n in (16, 256)
  )
  assert (small["chips"], large["chips"]) == (16, 256)
  assert large["batch_size"] == 4096
  assert small["examples_per_chip"] == large["examples_per_chip"]
  assert many["flops"] == pytest.approx(few["flops"], rel=1e-3)
  assert many["bytes_moved"] <= few["bytes_moved"]
  assert many["collectives"]["all-reduce"] == few["collectives"]["all-reduce"]


@pytest.mark.parametrize("name", STEP_TIMES)
def test_a_device_of_eight_costs_what_one_of_two_does(name):
  rows = read(f"scaling_{name}")["scaling"]
  assert [r["devices"] for r in rows] == [1, 2, 4, 8]
  for row in rows[1:]:
    assert row["collectives"] == rows[1]["collectives"]
    assert row["collectives"]["all-reduce"]["count"] == 1
    for key in ("flops", "bytes_moved"):
      assert row[key] == pytest.approx(rows[0][key], rel=0.01), key


@pytest.mark.parametrize("name", STEP_TIMES)
def test_no_step_waits_for_its_data(name):
  for result in read(f"step_time_{name}")["backends"].values():
    assert result["data_wait_share"] < 0.01


def test_seconds_before_and_after_are_on_the_page():
  found = []
  for kind in ("doubled_batch", "two_passes"):
    seconds = compiled(f"small_{kind}")[1]["seconds"]
    found.append((seconds["compile"], seconds["cpu"]))
  (one, cpu_one), (two, cpu_two) = found
  assert (
      f"{one:.0f} s in one pass ({cpu_one:.0f} s of CPU), {two:.0f} s in two "
      f"({cpu_two:.0f} s)"
  ) in " ".join(PAGE.split())
