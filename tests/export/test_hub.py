"""Networks packed, unpacked, and sent through a hub on this machine."""

import json
import math
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

from bcm_jax import errors
from bcm_jax import main as main_lib
from bcm_jax import train
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.evaluation import evaluate
from bcm_jax.export import hub as hub_command
from bcm_jax.export import model_folder
from tests import hub_server
from tests import toys

pytestmark = pytest.mark.slow

# One level, one block, two averages.
SETTINGS = {
    **toys.TINY,
    "training.num_steps": "4", "training.batch_size": "16",
    "training.ema_rates": "0.5,0.9", "sample.average": "ema_0.5",
    "sample.num_samples": "20", "sample.batch_size": "20",
    "sample.nfe": "none", "sample.times": "2.5",
    "eval.num_samples": "20", "eval.num_real_for_prdc": "50",
    "eval.samplers": "onestep,", "eval.inversion_nfe": "1,",
    "invert.num_images": "20", "edit.pairs": "2", "edit.num_interpolants": "3",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
  """A run as training leaves it, of random weights, with its numbers."""
  workdir = str(tmp_path_factory.mktemp("run"))
  config = resolve.resolve(resolve.read_file("digits.py"), SETTINGS)
  experiment = build.build(config)
  draw = np.random.default_rng(0).standard_normal

  def moved(x):
    x = np.asarray(x)
    return x + np.float32(0.1 * draw(x.shape)) if x.dtype == np.float32 else x

  state = jax.jit(lambda: build.create_state(experiment))().saved()
  resolve.write(config, workdir)
  with checkpoint.Checkpoints(runs.checkpoint_dir(workdir)) as saved:
    for step in (2, 4):
      saved.save(step, jax.tree.map(moved, state), {})
  evaluate.run(experiment, workdir)
  return pathlib.Path(workdir)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> pathlib.Path:
  """The run, packed."""
  out = tmp_path_factory.mktemp("packed") / "model"
  model_folder.pack(str(run), str(out))
  return out


def hub(*arguments) -> None:
  hub_command.main([str(a) for a in arguments])


def main(*arguments: str) -> None:
  """Runs the main command in this process; returns if it succeeds."""
  with pytest.raises(SystemExit) as done:
    main_lib.main(["bcm_jax", *arguments])
  assert not done.value.code


def fails(capsys, *arguments) -> str:
  """Runs the command; returns its one line of complaint."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as stop:
    hub(*arguments)
  assert stop.value.code == errors.EXIT_BAD_INPUT
  # Bars of progress end in carriage returns.
  lines = capsys.readouterr().err.splitlines()
  assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
  return lines[-1]


def params_of(workdir, average=None, step=None):
  experiment = build.build(resolve.of_run(str(workdir)), to_train=False)
  return runs.load_run(experiment, str(workdir), average, step)


def files_of(folder) -> dict[str, bytes]:
  return {
      p.relative_to(folder).as_posix(): p.read_bytes()
      for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()
  }


# Packing and unpacking -----------------------------------------------------


def test_a_folder_holds_what_the_run_holds(run, folder):
  config, params, metadata = model_folder.read(str(folder))
  step, average, expected = params_of(run)
  assert config == json.loads((run / "config.json").read_text())
  toys.assert_equal(params, expected)
  assert (metadata["step"], metadata["average"]) == (step, average) == (
      4, "ema_0.5"
  )
  result = json.loads((run / "eval" / "4.json").read_text())
  assert model_folder.read_result(str(folder)) == result
  front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
  assert front["library_name"] == "bcm_jax"
  distance = result["samplers"]["onestep_nfe1"]["FD (raw pixels)"]
  assert f"| FD (raw pixels) | {distance:.4g} |" in (
      folder / "README.md"
  ).read_text()


def samples(workdir):
  main("--mode=sample", f"--workdir={workdir}")
  with np.load(workdir / "samples/onestep_nfe1/samples.npz") as data:
    return data["arr_0"], data["arr_1"]


def test_unpacked_run_makes_the_same_samples(run, folder, tmp_path, capsys):
  out = tmp_path / "unpacked"
  hub("unpack", folder, out)
  assert f"written: {out}" in capsys.readouterr().out
  before = samples(run)
  for old, new in zip(before, samples(out), strict=True):
    np.testing.assert_array_equal(old, new)
  # Other weights of the run make other images.
  main("--mode=sample", f"--workdir={run}", "--config.sample.average=params")
  with np.load(run / "samples/onestep_nfe1/samples.npz") as data:
    assert np.any(data["arr_0"] != before[0])


def test_a_folder_is_no_run_and_says_what_makes_one(run, folder, capsys):
  with pytest.raises(errors.UserError, match="hub unpack"):
    params_of(folder)
  line = fails(capsys, "pack", run, "out", "--config=digits.py")
  assert "--config" in line
  line = fails(capsys, "--average", "ema_0.7", "pack", run, "out")
  assert "ema_0.7" in line and "command: got" not in line


@pytest.mark.slow
def test_every_mode_takes_an_unpacked_run(run, folder, tmp_path, capsys):
  out = tmp_path / "unpacked"
  hub("unpack", folder, out)
  main("--mode=eval", f"--workdir={out}")
  result = json.loads((out / "eval" / "4.json").read_text())
  expected = json.loads((run / "eval" / "4.json").read_text())
  for section in ("samplers", "inversion"):
    assert result[section] == expected[section]
  for mode in ("invert", "edit"):
    main(f"--mode={mode}", f"--workdir={out}")
  capsys.readouterr()
  main("--mode=inspect", f"--workdir={out}", f"--compare={out}@4")
  text = capsys.readouterr().out
  assert "network student: norm of parameters" in text
  assert "newest valid checkpoint: step 4, written by bcm_jax 0" in text
  # Training starts from it.
  toys.assert_equal(runs.load_params(str(out), None), params_of(run)[2])


def test_a_run_does_not_go_on_in_it_by_mistake(folder, tmp_path):
  out = tmp_path / "unpacked"
  hub("unpack", folder, out)
  config = resolve.of_run(str(out), {"eval.at_end": "false"})
  with pytest.raises(errors.UserError, match="training.init_from|state"):
    train.train_and_evaluate(config, str(out))


@pytest.mark.parametrize("average, step", [
    ("ema_0.5", 2), ("ema_0.5", 4), ("params", 4),
])
def test_averages_and_steps(run, tmp_path, average, step):
  out = tmp_path / "out"
  hub("pack", run, out, f"--average={average}", f"--step={step}")
  _, params, metadata = model_folder.read(str(out))
  assert (metadata["step"], metadata["average"]) == (step, average)
  toys.assert_equal(params, params_of(run, average, step)[2])
  # Numbers are of the last step's first average alone.
  evaluated = (average, step) == ("ema_0.5", 4)
  assert (model_folder.read_result(str(out)) is not None) == evaluated
  card = (out / "README.md").read_text()
  assert ("## Metrics\n\nnot measured\n" in card) != evaluated


def test_half_the_size_rounds_a_run(run, folder, tmp_path, capsys):
  out = tmp_path / "half"
  hub("pack", run, out, "--dtype=bfloat16", "--license=mit")
  _, exact, _ = model_folder.read(str(folder))
  count = sum(math.prod(v.shape) for v in jax.tree.leaves(exact))
  size = (out / model_folder.WEIGHTS).stat().st_size
  assert f"{count:,} parameters, bfloat16, {size:,} bytes" in (
      capsys.readouterr().out
  )
  assert 2 * count < size < 2 * count + 8000
  assert "license: \"mit\"" in (out / "README.md").read_text()
  hub("unpack", out, tmp_path / "unpacked")
  rounded = params_of(tmp_path / "unpacked")[2]
  for a, b in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True):
    assert b.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=2.0**-8)


def test_an_average_that_a_config_asks_for_is_packed_alone(run, tmp_path):
  out, again = tmp_path / "packed", tmp_path / "unpacked"
  model_folder.pack(str(run), str(out), average="ema_0.9")
  assert model_folder.read(str(out))[0]["sample"]["average"] == "ema_0.5"
  model_folder.unpack(str(out), str(again))
  toys.assert_equal(params_of(again)[2], params_of(run, "ema_0.9")[2])
  meta = checkpoint.Checkpoints(runs.checkpoint_dir(str(again))).read_raw()[2]
  assert meta["released"]["average"] == "ema_0.9"


@pytest.mark.slow
def test_a_result_of_several_averages_is_found(run, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(run, copy)
  result = json.loads((copy / "eval" / "4.json").read_text())
  (copy / "eval" / "4.json").unlink()
  for average in ("ema_0.9", "params"):
    (copy / "eval" / f"4_{average}.json").write_text(
        json.dumps(result | {"average": average})
    )
  model_folder.pack(str(copy), str(tmp_path / "a"), average="params")
  assert model_folder.read_result(str(tmp_path / "a"))["average"] == "params"
  model_folder.pack(str(copy), str(tmp_path / "b"))
  assert model_folder.read_result(str(tmp_path / "b")) is None
  (copy / "eval" / "4_params.json").write_text("{")
  with pytest.raises(errors.UserError, match="eval"):
    model_folder.pack(str(copy), str(tmp_path / "c"), average="params")


def test_places_of_this_machine_are_told_and_can_be_changed(
    run, tmp_path, capsys
):
  hub("pack", run, tmp_path / "a",
      "--config.sample.guidance_network=/home/me/secret")
  assert "sample.guidance_network=/home/me/secret" in capsys.readouterr().out
  hub("pack", run, tmp_path / "b", "--config.sample.guidance_network=none")
  assert "names places" not in capsys.readouterr().out
  sample = model_folder.read(str(tmp_path / "b"))[0]["sample"]
  assert sample["guidance_network"] is None


def test_a_folder_names_no_code_to_run(run, tmp_path):
  out = tmp_path / "a"
  model_folder.pack(str(run), str(out), overrides={"eval.features": "os:abort"})
  experiment, _, _ = model_folder.load(str(out))
  assert experiment.config.eval.features == "pixels"
  mine, _, _ = model_folder.load(str(out), {"eval.features": "a:b"})
  assert mine.config.eval.features == "a:b"


# Refusals ------------------------------------------------------------------


def other(folder, tmp_path, change):
  """The folder with parameters changed, well-formed all the same."""
  config, params, metadata = model_folder.read(str(folder))
  change(params)
  out = tmp_path / "other"
  model_folder.write(str(out), config, params, metadata)
  return out


def grow(params):
  params["time_embed_align"]["kernel"] = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
  "change, said",
  [
    (
      lambda p: p["time_embed_align"].pop("kernel"),
      "time_embed_align.kernel",
    ),
    (
      lambda p: p.update(more={"a": np.zeros(2, np.float32)}),
      "more.a",
    ),
    (
      grow,
      "time_embed_align.kernel: got (2, 3)",
    ),
    (lambda p: [p.pop(k) for k in sorted(p)[1:]], "49 more"),
  ],
)
def test_tensors_of_another_network(folder, tmp_path, capsys, change, said):
  line = fails(
    capsys, "unpack", other(folder, tmp_path, change), tmp_path / "out"
  )
  assert said in line and "model.safetensors" in line
  assert os.listdir(tmp_path) == ["other"]


def test_a_config_of_another_version(folder, tmp_path, capsys):
  config, params, metadata = model_folder.read(str(folder))
  config["sample"]["brightness"] = 3
  model_folder.write(str(tmp_path / "a"), config, params, metadata)
  line = fails(capsys, "unpack", tmp_path / "a", tmp_path / "out")
  assert "config.json" in line and "sample.brightness" in line


@pytest.mark.parametrize(
  "arguments, said",
  [
    ([], "pack, unpack, push, pull"),
    (["pakc", "a", "b"], "'pack'"),
    (["pack", "a"], "FOLDER"),
    (["pack", "/nowhere", "b"], "/nowhere"),
    (["unpack", "/nowhere", "b"], "model.safetensors"),
    (["pull", "a/b", "c", "--private"], "--private"),
    (["pull", "a/b", "c", "--config.seed=1"], "--config."),
    (["push", "/nowhere", "me/it"], "/nowhere"),
    (["push", "a", "it"], "'it'"),
    (["pull", "../it/there", "c"], "../it/there"),
  ],
)
def test_bad_command_lines(tmp_path, monkeypatch, capsys, arguments, said):
  monkeypatch.chdir(tmp_path)
  assert said in fails(capsys, *arguments)
  assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_bad_packing(run, folder, tmp_path, capsys):
  out = tmp_path / "out"
  assert "sample.average" in fails(capsys, "pack", run, out, "--average=ema_7")
  assert "step 3" in fails(
    capsys, "pack", run, out, "--step=3"
  )
  assert "'float32'" in fails(capsys, "pack", run, out, "--dtype=float23")
  assert "config" in fails(
    capsys, "pack", run, out, "--config.model.model_channels=16"
  )
  assert not out.exists()
  for verb, source in (("pack", run), ("unpack", folder)):
    assert str(folder) in fails(capsys, verb, source, folder)
  assert "cannot create" in fails(
    capsys, "pack", run, folder / "README.md" / "out"
  )


# The hub -------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch):
  """The hub that the library talks to, with a token that may write."""
  monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
  with hub_server.running() as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    yield hub


def test_pushed_and_pulled_is_the_same_to_the_byte(
  folder, tmp_path, online, capsys
):
  source = tmp_path / "source"
  shutil.copytree(folder, source)
  # What lies beside the four files does not travel.
  (source / "notes.txt").write_text("mine")
  (source / "sub").mkdir()
  (source / "sub" / "README.md").write_text("mine too")
  hub("push", source, "me/digits")
  assert "uploaded: " in capsys.readouterr().out
  assert online.repositories["me/digits"].files == files_of(folder)
  assert not online.repositories["me/digits"].private
  # Nor does what others put there.
  online.repositories["me/digits"].files["pickle.pkl"] = b"evil"
  hub("pull", "me/digits", tmp_path / "pulled")
  assert files_of(tmp_path / "pulled") == files_of(folder)
  assert not any("pickle" in line for line in online.log)


def test_a_work_directory_is_packed_on_the_way(run, folder, tmp_path, online):
  hub("push", run, "me/a")
  assert online.repositories["me/a"].files == files_of(folder)
  hub(
    "push",
    run,
    "me/b",
    "--average=params",
    "--dtype=bfloat16",
    "--private",
    "--license=mit",
    "--config.sample.num_samples=7",
  )
  assert online.repositories["me/b"].private
  hub("pull", "me/b", tmp_path / "b")
  config, _, metadata = model_folder.read(str(tmp_path / "b"))
  assert metadata["average"] == "params" and metadata["dtype"] == "bfloat16"
  assert config["sample"]["num_samples"] == 7


def test_old_numbers_do_not_stay_beside_new_weights(run, tmp_path, online):
  hub("push", run, "me/a")
  first = online.repositories["me/a"].main
  hub("push", run, "me/a", "--average=params")
  assert model_folder.RESULT not in online.repositories["me/a"].files
  # A revision brings what was there.
  hub("pull", f"me/a@{first[:0]}main", tmp_path / "new")
  hub("pull", f"me/a@{first}", tmp_path / "old")
  for name, result in (("old", True), ("new", False)):
    found = model_folder.read_result(str(tmp_path / name))
    assert (found is not None) == result


def test_private_things_go_to_no_public_place(folder, online, capsys):
  hub("push", folder, "me/open")
  before = list(online.repositories["me/open"].commits)
  line = fails(capsys, "push", folder, "me/open", "--private")
  assert "me/open" in line and "public" in line
  assert list(online.repositories["me/open"].commits) == before


def test_packed_folders_are_not_packed_again(folder, online, capsys):
  line = fails(capsys, "push", folder, "me/a", "--step=0")
  assert "step" in line
  assert not online.log


def test_damage_does_not_travel(folder, tmp_path, online, capsys):
  source = tmp_path / "source"
  shutil.copytree(folder, source)
  content = bytearray((source / model_folder.WEIGHTS).read_bytes())
  content[-3] ^= 1
  (source / model_folder.WEIGHTS).write_bytes(content)
  assert "digest" in fails(capsys, "push", source, "me/a")
  assert not online.log
  hub("push", folder, "me/a")
  online.repositories["me/a"].files[model_folder.WEIGHTS] = bytes(content)
  line = fails(capsys, "pull", "me/a", tmp_path / "out")
  assert "me/a/model.safetensors" in line
  del online.repositories["me/a"].files[model_folder.WEIGHTS]
  line = fails(capsys, "pull", "me/a", tmp_path / "out")
  assert "me/a" in line and "model.safetensors" in line
  assert os.listdir(tmp_path) == ["source"]


def test_who_may_not_is_told_how_to_log_in(
  folder, tmp_path, online, capsys, monkeypatch
):
  hub("push", folder, "me/mine", "--private")
  monkeypatch.setenv("HF_TOKEN", "hf_wrong")
  for arguments in (
    ["push", folder, "me/other"],
    ["pull", "me/mine", tmp_path / "out"],
    ["pull", "me/nothing", tmp_path / "out"],
  ):
    line = fails(capsys, *arguments)
    assert "hf auth login" in line and "HF_TOKEN" in line, line
    assert "hf_wrong" not in line
  assert not (tmp_path / "out").exists()


def test_what_the_hub_says_is_one_line(
  folder, tmp_path, online, capsys, monkeypatch
):
  hub("push", folder, "me/a")
  line = fails(capsys, "pull", "me/a@never", tmp_path / "out")
  assert "me/a@never" in line
  online.fails = 500
  for arguments in (
    ["push", folder, "me/b"],
    ["pull", "me/a", tmp_path / "out"],
  ):
    assert "500" in fails(capsys, *arguments)
  assert "me/b" not in online.repositories
  assert "Cannot have -- or .." in fails(capsys, "push", folder, "me/a--b")
  assert str(folder) in fails(capsys, "pull", "me/a", folder)
  assert not os.listdir(tmp_path)


def test_a_license_that_the_hub_does_not_know(run, online, capsys):
  line = fails(capsys, "push", run, "me/a", "--license=unheard-of")
  assert '"license" must be one of [mit]' in line
  assert online.repositories["me/a"].files == {}


def test_no_connection(folder, tmp_path, online, capsys, monkeypatch):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))  # Bound, not listening: refused.
    address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    for arguments in (
      ["push", folder, "me/b"],
      ["pull", "me/a", tmp_path / "out"],
    ):
      assert "Connection refused" in fails(capsys, *arguments)
  assert not (tmp_path / "out").exists()


def test_without_the_library(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  for arguments in (
    ["push", folder, "me/b"],
    ["pull", "me/a", tmp_path / "out"],
  ):
    assert "pip install 'bcm_jax[hub]'" in fails(capsys, *arguments)
  hub("unpack", folder, tmp_path / "unpacked")


@pytest.mark.slow
def test_the_library_is_imported_late():
  code = (
    "import sys\n"
    "from bcm_jax.export import hub\n"
    "assert 'huggingface_hub' not in sys.modules\n"
    "hub.main(['--help'])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], check=False, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "OWNER/NAME[@REVISION]" in done.stdout
