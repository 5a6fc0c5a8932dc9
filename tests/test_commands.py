"""Real tiny runs of every mode through main.py, on the real digits."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from bcm_jax import errors
from bcm_jax import main as main_lib
from tests import toys
from tests.training import tiny_run

pytestmark = pytest.mark.slow

STEPS = 8
EVERY = 4
# One level, one block: small enough to compile in seconds.
TINY = {
    **toys.TINY,
    "model.dropout": "0.1",
    "method.s0": "4", "method.s1": "16",
    "training.num_steps": str(STEPS), "training.batch_size": "16",
    "checkpoint.every_steps": str(EVERY), "log.every_steps": "1",
    "eval.num_samples": "20", "eval.num_real_for_prdc": "50",
    "sample.num_samples": "20", "sample.batch_size": "20",
    "sample.nfe": "None", "sample.times": "2.5", "sample.average": "None",
    "invert.num_images": "20", "edit.pairs": "2", "edit.num_interpolants": "3",
}


def flags(*extra: str, **overrides: str) -> list[str]:
  values = TINY | {k.replace("__", "."): v for k, v in overrides.items()}
  return [*extra, *(f"--config.{k}={v}" for k, v in values.items())]


def main(*arguments: str) -> None:
  """Runs the command in this process; returns if it exits with success."""
  with pytest.raises(SystemExit) as done:
    main_lib.main(["bcm_jax", *arguments])
  assert not done.value.code


def fails(capsys, *arguments: str) -> str:
  """Runs a command that must fail on bad input; returns its one line."""
  with pytest.raises(SystemExit) as done:
    main_lib.main(["bcm_jax", *arguments])
  assert done.value.code == errors.EXIT_BAD_INPUT
  lines = [
      line for line in capsys.readouterr().err.splitlines()
      if line.startswith("error: ")
  ]
  assert len(lines) == 1
  return lines[0]


def train(workdir, *, config="configs/digits.py", **overrides: str) -> None:
  main(f"--config={config}", f"--workdir={workdir}", *flags(**overrides))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
  """A finished run, trained without a break."""
  workdir = tmp_path_factory.mktemp("run")
  train(workdir)
  return workdir


def state_digests(workdir) -> dict:
  """Digests of every tensor of the last checkpoint."""
  step = workdir / "checkpoints" / str(STEPS)
  record = json.loads((step / "meta" / "metadata").read_text())
  return record["leaves"]


def metric_lines(workdir) -> list[dict]:
  """metrics.jsonl apart from times."""
  timed = ("steps_per_sec", "uptime")
  lines = []
  for text in (workdir / "metrics.jsonl").read_text().splitlines():
    line = json.loads(text)
    line = {k: v for k, v in line.items() if not k.startswith(timed)}
    if len(line) > 1 and "kind" not in line:
      lines.append(line)
  return lines


def test_training_leaves_a_run_that_explains_itself(run):
  config = json.loads((run / "config.json").read_text())
  assert config["method"]["name"] == "bcm"
  assert config["method"]["curriculum_steps"] == STEPS
  steps = [line["step"] for line in metric_lines(run) if "loss" in line]
  assert steps == list(range(1, STEPS + 1))
  assert (run / "checkpoints" / str(STEPS)).is_dir()
  for folder in ("samples/onestep_nfe1", "samples/ancestral_nfe2",
                 "inversions/nfe1", "inversions/nfe2", "edits/interpolate"):
    with Image.open(run / folder / "grid.png") as picture:
      assert min(picture.size) > 8


def test_evaluation_holds_every_number(run):
  result = json.loads((run / "eval" / f"{STEPS}.json").read_text())
  assert set(result["samplers"]) == {
      "onestep_nfe1", "ancestral_nfe2", "mixture_nfe4"
  }
  for numbers in result["samplers"].values():
    worst, mean = numbers["worst_class_accuracy"], numbers["class_accuracy"]
    assert 0 <= worst <= mean <= 1
    assert {
      "precision",
      "recall",
      "density",
      "coverage",
      "KID",
      "FD (raw pixels)",
      "memorization_ratio",
    } <= set(numbers)
    assert numbers["seeds"]["0"]["KID"] == numbers["KID"]
  assert set(result["inversion"]) == {"nfe1", "nfe2"}
  assert result["classifier_test_accuracy"] > 0.98
  assert result["protocol"]["samples"] == 20
  assert result["protocol"]["few_samples"] == "20 of the protocol's 50000"
  assert result["protocol"]["reference_images"] == 1437
  assert result["protocol"]["config_digest"]
  assert result["training"]["images"] == STEPS * 16
  assert 0 < result["training"]["seconds"] < 600


def test_sample_files(run):
  with np.load(run / "samples/onestep_nfe1/samples.npz") as data:
    images, labels = data["arr_0"], data["arr_1"]
  assert images.dtype == np.uint8
  assert images.shape == (20, 8, 8, 1)
  assert list(labels) == [i % 10 for i in range(20)]


def test_sample_mode_takes_the_runs_config(run, capsys):
  main(
    "--mode=sample",
    f"--workdir={run}",
    "--config.sample.sampler=zigzag",
    "--config.sample.label=3",
    "--config.sample.num_samples=5",
    "--config.sample.seed=1",
  )
  assert "zigzag: 3 NFE" in capsys.readouterr().out
  with np.load(run / "samples/zigzag_nfe3/samples.npz") as data:
    assert list(data["arr_1"]) == [3] * 5


def test_samples_depend_on_their_position_not_on_the_batch(run):
  def samples(batch):
    main(
      "--mode=sample",
      f"--workdir={run}",
      "--config.sample.sampler=onestep",
      f"--config.sample.batch_size={batch}",
    )
    with np.load(run / "samples/onestep_nfe1/samples.npz") as data:
      return data["arr_0"].astype(int)

  first, second = samples(20), samples(8)
  # Another batch size may round differently, by one grey level at most.
  assert np.abs(first - second).max() <= 1
  assert np.abs(first[0] - first[1]).max() > 1


def test_invert_mode(run):
  main("--mode=invert", f"--workdir={run}", "--config.invert.nfe=3")
  folder = run / "inversions/nfe3"
  with np.load(folder / "inversion.npz") as data:
    difference = data["originals"] / 255.0 - data["reconstructions"] / 255.0
    mse = np.mean(difference**2)
    assert data["latents"].shape == (20, 8, 8, 1)
  assert json.loads((folder / "result.json").read_text())["mse"] == (
    pytest.approx(mse)
  )


def test_edit_mode(run):
  main("--mode=edit", f"--workdir={run}", "--config.edit.num_interpolants=4")
  with np.load(run / "edits/interpolate/interpolation.npz") as data:
    assert data["images"].shape == (2, 6, 8, 8, 1)


def test_eval_mode_repeats_the_numbers(run):
  path = run / "eval" / f"{STEPS}.json"
  before = json.loads(path.read_text())
  path.unlink()
  main("--mode=eval", f"--workdir={run}")
  after = json.loads(path.read_text())
  for section in ("samplers", "inversion"):
    assert after[section] == before[section]


def test_inspect_mode(run, capsys):
  main("--mode=inspect", f"--workdir={run}", f"--compare=@{EVERY}")
  text = capsys.readouterr().out
  for part in ("== config", "== networks and phases", "== schedule",
               "== times at the last N", "== weighting", "== parameters",
               "network student: 8 updates", "tensors equal",
               "0 step(s) repeated",
               "time_embed_align"):
    assert part in text


def test_finished_run_is_not_trained_again(run):
  before = state_digests(run)
  lines = metric_lines(run)
  train(run)
  assert state_digests(run) == before
  assert metric_lines(run) == lines


# The run is killed as if by the kernel at the end of a step's bookkeeping. It
# does not have TensorFlow: no spec, for whoever looks.
KILL = """
import importlib.machinery, os, sys
class Hidden(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "tensorboard"):
      return None
    return super().find_spec(name, path, target)
sys.meta_path = [
    Hidden if f is importlib.machinery.PathFinder else f for f in sys.meta_path
]
from bcm_jax import main
from bcm_jax.training import metric_logger
report = metric_logger.MetricLogger.__call__
def killed(self, step, count, metrics):
  report(self, step, count, metrics)
  if step == int(sys.argv[1]):
    os._exit(9)
metric_logger.MetricLogger.__call__ = killed
main.main(["bcm_jax", *sys.argv[2:]])
"""


def test_killed_run_resumes_bit_for_bit(run, tmp_path):
  """Without TensorFlow to the kill, with it from there."""
  # tests/training kills a smaller run at every other moment.
  arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}",
               *flags(eval__at_end="False")]
  killed = subprocess.run(
    [sys.executable, "-c", KILL, str(EVERY + 1), *arguments],
    check=False,
    capture_output=True,
    text=True,
  )
  assert killed.returncode == 9, killed.stderr
  assert not (tmp_path / "checkpoints" / str(STEPS)).exists()
  assert not (tmp_path / "tensorboard").exists()
  train(tmp_path, eval__at_end="False")
  assert state_digests(tmp_path) == state_digests(run)
  assert metric_lines(tmp_path) == metric_lines(run)


def test_fine_tuning_starts_from_a_consistency_model(tmp_path, capsys):
  source, target = tmp_path / "ict", tmp_path / "bcm"
  train(
    source,
    config="configs/digits_ict.py",
    training__num_steps="2",
    eval__at_end="False",
  )
  assert "inversion" not in capsys.readouterr().out
  train(
    target,
    config="configs/digits_bcm_finetune.py",
    training__init_from=str(source),
    training__num_steps="1",
    optimizer__learning_rate="0.0",
    eval__at_end="False",
  )
  capsys.readouterr()
  main("--mode=inspect", f"--workdir={target}", f"--compare={source}")
  text = capsys.readouterr().out
  # All of the source is there, under the learning rate 0 unchanged but for
  # the average that the run starts from; the second time branch is new.
  assert "time_embed_align.kernel: (64, 32) against None" in text
  assert "time_embed_end_0.kernel: (8, 32) against None" in text
  assert "input_blocks_0_0.kernel: (" not in text


def test_bad_starts_for_fine_tuning(run, tmp_path, capsys):
  line = fails(
    capsys,
    "--config=configs/digits.py",
    f"--workdir={tmp_path / 'a'}",
    *flags(training__init_from=str(tmp_path / "none")),
  )
  assert "no checkpoint" in line
  line = fails(
    capsys,
    "--config=configs/digits.py",
    f"--workdir={tmp_path / 'b'}",
    *flags(training__init_from=str(run), model__model_channels="16"),
  )
  assert "init_from" in line


def test_another_config_is_refused_and_nothing_is_lost(run, capsys):
  before = (run / "config.json").read_text(), state_digests(run)
  line = fails(
    capsys,
    "--config=configs/digits.py",
    f"--workdir={run}",
    *flags(seed="5"),
  )
  assert "seed is 0 there, 5 here" in line
  assert ((run / "config.json").read_text(), state_digests(run)) == before


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["--mode=smaple", "--workdir=x"], "did you mean 'sample'"),
    (["--workdri=x"], "Did you mean: workdir"),
    (["--mode=sample"], "--workdir: got None"),
    (["--mode=sample", "--workdir=/nonexistent"], "--config: got None"),
    (["--workdir=x"], "--config: got None"),
    (["--config=configs/digit.py", "--workdir=x"], "digits.py"),
    (["stray", "--workdir=x"], "arguments: got 'stray'"),
    (["--config=configs/digits.py", "--workdir=/proc/none"], "a writable"),
  ],
)
def test_bad_command_lines(arguments, said, capsys):
  assert said in fails(capsys, *arguments)


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["--config.sample.label=10"], "0 .. 9"),
    (
      ["--config.sample.sampler=ancestral", "--config.sample.times=1,2"],
      "strictly decreasing",
    ),
    (
      ["--config.sample.sampler=ancestral", "--config.sample.times=90"],
      "the range of training",
    ),
    (["--config.sample.average=ema_0.5"], "sample.average"),
  ],
)
def test_bad_sampling_requests(run, arguments, said, capsys):
  line = fails(capsys, "--mode=sample", f"--workdir={run}", *arguments)
  assert said in line


def test_nan_loss_stops_with_a_diagnosis(tmp_path, capsys):
  tiny_run.register()
  line = fails(
    capsys,
    f"--config={tiny_run.__file__}",
    f"--workdir={tmp_path}",
    "--config.parallel.cpu_devices=0",
    "--config.training.max_consecutive_nonfinite=2",
    "--config.method.sigma_data=1e30",
  )
  assert "2 steps in a row were not finite" in line
  assert "optimizer.learning_rate" in line
  assert (tmp_path / "diagnostics" / "step-2" / "report.json").exists()


def test_missing_and_damaged_checkpoints(run, tmp_path, capsys):
  (tmp_path / "config.json").write_text((run / "config.json").read_text())
  line = fails(capsys, "--mode=sample", f"--workdir={tmp_path}")
  assert "no checkpoint" in line
  for step in (EVERY, STEPS):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  line = fails(capsys, "--mode=eval", f"--workdir={tmp_path}")
  assert str(STEPS) in line


def test_module_is_a_command_with_help():
  done = subprocess.run(
    [sys.executable, "-m", "bcm_jax.main", "--help"],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ,
  )
  assert "--workdir" in done.stdout
  assert "--mode" in done.stdout
