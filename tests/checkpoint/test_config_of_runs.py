"""A run is used only with the config under which its checkpoint was written."""

import json
import shutil

import numpy as np
import pytest

import bcm_jax
from bcm_jax import errors
from bcm_jax import main
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from tests import toys

SETTINGS = {
    **toys.TINY, "sample.num_samples": "2", "sample.batch_size": "2",
    "training.ema_rates": "0.5,",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A work directory as training leaves it."""
  workdir = str(tmp_path_factory.mktemp("run"))
  config = resolve.resolve(resolve.read_file("configs/digits.py"), SETTINGS)
  state = build.create_state(build.build(config)).saved()
  resolve.write(config, workdir)
  with checkpoint.Checkpoints(runs.checkpoint_dir(workdir)) as saved:
    saved.save(2, state, {"config": resolve.to_json(config)})
  return workdir


def edited(run, path, section, **values):
  """Returns a copy of the run with other values in config.json."""
  shutil.copytree(run, path)
  file = path / "config.json"
  content = json.loads(file.read_text())
  content[section] |= values
  file.write_text(json.dumps(content))
  return str(path)


def test_the_own_config(run):
  assert bcm_jax.load(run).sample(1, labels=0).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("section, values, key", [
    ("method", {"sigma_data": 5.0}, "method.sigma_data"),
    ("model", {"num_groups": 2}, "model.num_groups"),
    ("model", {"model_channels": 16}, "model.model_channels"),
    ("data", {"image_shape": [16, 16, 1]}, "data.image_shape"),
])
def test_an_edited_config_is_refused(run, tmp_path, section, values, key):
  workdir = edited(run, tmp_path / "run", section, **values)
  with pytest.raises(errors.UserError, match=key):
    bcm_jax.load(workdir)


def test_sampling_may_be_edited(run, tmp_path):
  workdir = edited(run, tmp_path / "run", "sample", seed=3)
  assert bcm_jax.load(workdir).sample(1, labels=0).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("flag", [
    "model.model_channels=16", "model.num_res_blocks=2",
])
def test_flags_of_another_network_are_refused(run, flag, capsys):
  with pytest.raises(SystemExit) as done:
    main.main([
        "main", f"--workdir={run}", "--mode=sample", f"--config.{flag}"
    ])
  assert done.value.code == errors.EXIT_BAD_INPUT
  assert "config.model: got" in capsys.readouterr().err


def test_images_that_are_not_finite_are_refused(run, tmp_path):
  with checkpoint.Checkpoints(runs.checkpoint_dir(run)) as saved:
    _, state, meta = saved.read_raw()
  average = state["averages"]["ema_0.5"]
  huge = {
      k: {n: np.full_like(v, 1e30) for n, v in part.items()}
      if "kernel" in part else part
      for k, part in average.items()
  }
  state["averages"]["ema_0.5"] = huge
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  with checkpoint.Checkpoints(
      runs.checkpoint_dir(str(tmp_path / "run"))
  ) as saved:
    saved.save(2, state, meta)
  with pytest.raises(errors.UserError, match="not finite"):
    bcm_jax.load(str(tmp_path / "run")).sample(1, labels=0)
