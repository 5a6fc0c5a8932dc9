"""The convert command: published weights in, a work directory out, and back."""

import json
import math
import os
import re

from flax import serialization
from flax import traverse_util
import jax
import numpy as np
import pytest

from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.generate import convert
from bcm_jax.interop import transfer
from bcm_jax.interop import weight_files
from bcm_jax.models import adm
from bcm_jax.models import edm2
from bcm_jax.models import song
from bcm_jax.training import train_state
from tests import golden
from tests.interop import craft

# File -> what its tensors do not tell.
SETTINGS = {
    "bcm_unet": ["--image-size=16", "--config.model.num_head_channels=16"],
    "cm_unet": ["--image-size=16", "--config.model.num_head_channels=16"],
    "ctm_songunet": [],
    "edm_adm": [],
    "edm_ncsnpp": [],
    "edm2_precond": ["--config.model.num_head_channels=16"],
}


def tensors_of(name):
  g = golden.load(name)
  return {
      k.removeprefix("state_dict/"): v
      for k, v in g.arrays.items() if k.startswith("state_dict/")
  }


def source_file(name, folder):
  return craft.save(folder / f"{name}_000007.pt", tensors_of(name))


def run(*arguments):
  convert.main([str(a) for a in arguments])


def fails(capsys, *arguments):
  """Runs the command; returns its one line of complaint."""
  with pytest.raises(SystemExit) as stop:
    run(*arguments)
  assert stop.value.code == 65
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  return error


@pytest.mark.parametrize("name", [
    # Others of their families are fast.
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("cm_unet", "edm_adm") else name
    for name in SETTINGS
])
def test_round_trip_is_bit_identical(name, tmp_path, capsys):
  out = tmp_path / "run"
  run(source_file(name, tmp_path), out, *SETTINGS[name])
  assert "tensors" in capsys.readouterr().out
  config = resolve.of_run(str(out))
  experiment = build.build(config)
  step, _, params = runs.load_run(experiment, str(out))
  assert step == 7
  expected = transfer.shapes(
      experiment.method.network, experiment.image_shape[0]
  )
  flat = traverse_util.flatten_dict(params)
  assert {k: v.shape for k, v in flat.items()} == expected
  back = tmp_path / "back.safetensors"
  run(out, back, "--reverse")
  there = weight_files.read(str(back)).groups[""]
  old = tensors_of(name)
  assert there.keys() == old.keys()
  for key, value in old.items():
    np.testing.assert_array_equal(there[key], value.astype(np.float32), key)


def test_jcm_checkpoint(tmp_path):
  tensors = tensors_of("jcm_ncsnpp")
  tree = traverse_util.unflatten_dict(
      {tuple(k.split("/")): v for k, v in tensors.items()}
  )
  moved = jax.tree.map(lambda v: v + 1, tree)
  path = tmp_path / "checkpoint_3"
  path.write_bytes(serialization.to_bytes(
      {"step": 3, "params": moved, "params_ema": tree}
  ))
  out = tmp_path / "run"
  run(path, out, "--image-size=16", "--config.model.attention_resolutions=8,")
  experiment = build.build(resolve.of_run(str(out)))
  step, _, params = runs.load_run(experiment, str(out))
  assert step == 3 and experiment.config.model.name == "ncsnpp"
  back = transfer.write_tensors(
      transfer.FAMILIES["jcm"], experiment.method.network, 16, params
  )
  assert back.keys() == tensors.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(back[key], value, key)


# Full widths, and a full depth of two families: names and shapes there and
# back, without allocating anything.
@pytest.mark.slow
@pytest.mark.parametrize("family, network, size", [
    ("openai", adm.ADM(num_classes=1000, two_time=True), 64),
    ("openai", adm.ADM(num_classes=1000, two_time=True, end_branch="blocks",
                       use_scale_shift_norm=True, qkv_norm=False,
                       num_res_blocks=1,
                       attention_resolutions=(32, 16, 8)), 64),
    ("edm-adm", adm.ADM(num_classes=1000, num_res_blocks=1, **adm.DHARIWAL),
     64),
    ("edm-song", song.SongUNet(augment_dim=9, num_classes=10), 32),
    ("edm-song", song.SongUNet(
        encoder="skip", decoder="skip", num_res_blocks=1), 32),
    ("edm2", edm2.EDM2(num_classes=1000, num_res_blocks=1), 64),
    ("jcm", song.SongUNet(num_res_blocks=1, **song.NCSNPP), 32),
])
def test_full_size_names_are_recognised(family, network, size):
  module = transfer.FAMILIES[family]
  shapes = transfer.shapes(network, size)
  nothing = traverse_util.unflatten_dict({
      k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()
  })
  tensors = transfer.write_tensors(module, network, size, nothing)
  found_family, stripped, found = transfer.recognize(tensors)
  assert found_family is module
  assert found.pop("image_size") == size
  assert type(network)(**found) == network.clone(
      dropout=found.get("dropout", network.dropout)
  )
  read = transfer.read_params(module, network, size, stripped)
  assert {
      k: v.shape for k, v in traverse_util.flatten_dict(read).items()
  } == shapes


def damaged(change, folder):
  tensors = tensors_of("ctm_songunet")
  change(tensors)
  path = str(folder / "damaged.safetensors")
  weight_files.write(path, tensors)
  return path


@pytest.mark.parametrize("change, match", [
    (lambda t: t.pop("model.enc.16x16_block0.norm1.weight"),
     r"1 tensors missing: enc\.16x16_block0\.norm1\.weight"),
    (lambda t: t.update({"model.map_augment.weight2": np.zeros(3, "f4")}),
     r"1 tensors unexpected: map_augment\.weight2 \(model\.augment_dim\)"),
    (lambda t: t.update(
        {"model.enc.16x16_block0.conv1.bias": np.zeros(7, "f4")}),
     r"enc\.16x16_block0\.conv1\.bias': got shape \(7,\), expected \(16,\)"),
    (lambda t: t.update({
        "model.enc.8x8_down.conv0.resample_filter":
            np.ones((1, 1, 2, 2), "f4")}), "resample_filter"),
    (lambda t: [t.pop(k) for k in list(t) if "map_layer0." in k],
     "kind 'edm-song', expected"),
])
def test_tensors_that_do_not_fit(change, match, tmp_path, capsys):
  out = tmp_path / "run"
  error = fails(capsys, damaged(change, tmp_path), out)

  assert re.search(match, error), error
  assert not out.exists()
  assert os.listdir(tmp_path) == ["damaged.safetensors"]


def test_bad_arguments(tmp_path, capsys):
  source = source_file("ctm_songunet", tmp_path)
  out = tmp_path / "run"
  assert "edm-song" in fails(capsys, source, out, "--kind=edm-sogn")
  assert "of kind openai" in fails(capsys, source, out, "--kind=openai")
  assert "--group: got ema" in fails(capsys, source, out, "--group=ema")
  assert "model.num_head" in fails(
      capsys, source, out, "--config.model.num_heads=4"
  )
  out.mkdir()
  (out / "mine").write_text("precious")
  assert "exists already" in fails(capsys, source, out)
  back = tmp_path / "back.safetensors"
  assert "no config.json" in fails(capsys, out, back, "--reverse")
  for suffix in (".pt", ".pth"):
    error = fails(capsys, out, tmp_path / f"back{suffix}", "--reverse")
    assert f"got suffix '{suffix}', expected .safetensors" in error
  foreign = tmp_path / "foreign.pt"
  foreign.write_bytes(b"not a checkpoint")
  fails(capsys, foreign, tmp_path / "other")
  assert not (tmp_path / "other").exists()
  assert [p.name for p in out.iterdir()] == ["mine"]


def test_what_is_assumed_can_be_set(tmp_path, capsys):
  out = tmp_path / "run"
  run(source_file("cm_unet", tmp_path), out, "--image-size=16",
      "--config.model.num_head_channels=16", "--config.sample.seed=5")
  said = capsys.readouterr().out
  assert "kind openai" in said and "qkv_norm=False" in said
  config = json.loads((out / "config.json").read_text())
  assert config["model"]["num_head_channels"] == 16
  assert config["sample"]["seed"] == 5
  assert config["method"]["preconditioning"] == "cm"
  assert config["data"]["image_shape"] == [16, 16, 3]
  _, _, params = runs.load_run(
      build.build(resolve.of_run(str(out))), str(out)
  )
  count = sum(math.prod(np.shape(v)) for v in jax.tree.leaves(params))
  assert f"{count:,} parameters" in said


def test_a_bidirectional_model_starts_from_converted_weights(tmp_path):
  """EDM's denoiser as the first time branch; F is what it was."""
  out = tmp_path / "run"
  run(source_file("edm_ncsnpp", tmp_path), out)
  config = resolve.of_run(str(out)).to_dict()
  config["model"]["two_time"] = True
  config["method"] = {"name": "bcm"}
  config["training"]["init_from"] = str(out)
  e = build.build(resolve.resolve(config))
  start = {"student": runs.load_params(str(out), None)}
  images, labels = build.example_batch(e)
  state = jax.jit(lambda: train_state.create(
      e.method, e.optimizers(), (), 0, images, labels, start
  ))()
  new = state.networks["student"].params
  for key, old in start["student"].items():
    jax.tree.map(np.testing.assert_array_equal, new[key], old)
  align = np.asarray(new["map_align"]["kernel"])
  top, bottom = np.split(align, 2)
  np.testing.assert_array_equal(top, np.eye(len(top)))
  assert not bottom.any()
  jax.tree.map(
      np.testing.assert_array_equal, new["map_layer0_end"],
      start["student"]["map_layer0"],
  )


@pytest.mark.parametrize("name, step", [
    ("ema_0.99997_234000.pt", 234_000),
    ("model006000.pt", 6000),
    ("edm2-img64-s-2147483-0.025.pkl", 2_147_483),
    ("edm-cifar10-32x32-cond-vp.pkl", 0),
    ("checkpoint_3", 3),
    ("weights.safetensors", 0),
])
def test_step_in_a_file_name(name, step):
  assert convert.step_of(f"some/7/{name}") == step
