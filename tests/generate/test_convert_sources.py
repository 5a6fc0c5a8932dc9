"""Conversion of checkpoints as people save them, and of what are none."""

import gzip
import json
import os

from flax import traverse_util
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.generate import convert
from bcm_jax.interop import transfer
from bcm_jax.interop import weight_files
from bcm_jax.interop.families import edm_names
from bcm_jax.interop.families import openai_names
from bcm_jax.models import song
from tests.interop import torch_writer

BCM = {"model.num_head_channels": "8", "model.num_groups": "4"}


def tensors_of(family, network, size):
  """Random weights of a network under their published names."""
  rng = np.random.default_rng(0)
  tree = traverse_util.unflatten_dict({
      path: rng.standard_normal(shape).astype(np.float32)
      for path, shape in transfer.shapes(network, size).items()
  })
  return transfer.write_tensors(family, network, size, tree)


@pytest.fixture(scope="module")
def bcm():
  model = dict(
      name="adm", model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
      attention_resolutions=(4,), num_head_channels=8, num_groups=4,
      two_time=True,
  )
  config = resolve.resolve({
      "model": model, "method": {"name": "bcm"},
      "data": {"name": "none", "image_shape": (8, 8, 3)},
  })
  network = build.build(config, to_train=False).method.network
  return tensors_of(openai_names, network, 8)


@pytest.fixture(scope="module")
def edm():
  network = song.SongUNet(
      model_channels=4, channel_mult=(1, 2), num_res_blocks=1,
      attention_resolutions=(),
  )
  return tensors_of(edm_names, network, 8)


def converted(tree, folder, **options):
  """Returns {published name: array} of the network in a saved tree."""
  return selected(torch_writer.save(folder / "x.pt", tree), **options)


def selected(source, group=None, prefix=None):
  file = weight_files.read(str(source))
  group = convert._choose_group(file.groups, group)
  size = {"image_size": 8}
  return transfer.recognize(file.groups[group], "auto", size, prefix)[1]


def refused(match, source, folder, **options):
  options = {"overrides": BCM, "image_size": 8} | options
  if isinstance(source, dict):
    source = torch_writer.save(folder / "x.pt", source)
  with pytest.raises(errors.UserError, match=match):
    convert.to_workdir(str(source), str(folder / "run"), **options)
  assert not (folder / "run").exists()


@pytest.mark.parametrize("step", [-1, 2**31, 10**20])
def test_steps_out_of_range(bcm, tmp_path, step):
  refused("--step", {"state_dict": bcm}, tmp_path, step=step)


@pytest.mark.parametrize("dtype", [np.complex64, np.int64, np.bool_])
def test_weights_that_are_no_floats(bcm, tmp_path, dtype):
  path = str(tmp_path / "x.safetensors")
  weights = {k: v.astype(dtype) for k, v in bcm.items()}
  safetensors.numpy.save_file(weights, path)
  refused(np.dtype(dtype).name, path, tmp_path)


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, name)


@pytest.mark.parametrize("rename", [
    "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.{}",
    "feedforward_model.{}", "net.{}", "ema_model.{}", "model.module.{}",
    "student.unet.{}",
])
def test_prefixes_are_removed(rename, bcm, tmp_path):
  tree = {"state_dict": {rename.format(k): v for k, v in bcm.items()}, "n": 3}
  assert_same(converted(tree, tmp_path), bcm)


def test_a_compiled_block_within_the_network(bcm, tmp_path):
  tree = {k.replace("in_layers", "_orig_mod.in_layers"): v
          for k, v in bcm.items()}
  assert_same(converted(tree, tmp_path), bcm)


@pytest.mark.parametrize("group", [
    "state_dict", "model_state_dict", "ema_state_dict", "generator", "anything",
])
def test_groups_beside_an_optimizer(group, bcm, tmp_path):
  optimizer = {"state": {"0": {"exp_avg": bcm["out.2.weight"], "step": 3}}}
  tree = {group: bcm, "optimizer": optimizer, "step": 7}
  assert_same(converted(tree, tmp_path), bcm)


@pytest.mark.parametrize("dtype", ["f2", "f8", ml_dtypes.bfloat16])
def test_other_precisions(dtype, bcm, tmp_path):
  tree = {k: v.astype(dtype) for k, v in bcm.items()}
  source = torch_writer.save(tmp_path / "x.pt", {"model": tree})
  convert.to_workdir(source, str(tmp_path / "run"), overrides=BCM, image_size=8)
  convert.to_file(str(tmp_path / "run"), str(tmp_path / "back.safetensors"))
  back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
  assert_same(back, {k: v.astype(np.float32) for k, v in tree.items()})


@pytest.mark.parametrize("average", ["ema", "model_ema", "ema_model"])
def test_the_average_is_taken(average, bcm, tmp_path):
  half = {k: v / 2 for k, v in bcm.items()}
  assert_same(converted({"model": bcm, average: half}, tmp_path), half)


def test_two_networks_are_named(bcm, tmp_path):
  two = {f"{p}{k}": v for p in ("fake_unet.", "generator.")
         for k, v in bcm.items()}
  refused("prefix: .*'fake_unet.', 'generator.'", two, tmp_path)
  refused("--prefix: got 'fake.'", two, tmp_path, prefix="fake.")
  refused(
      "--group: .*'fake', 'real'", {"real": bcm, "fake": bcm}, tmp_path
  )
  refused(
      "prefix: .*besides loss.w", {"loss.w": bcm["out.2.bias"]} |
      {f"net.{k}": v for k, v in bcm.items()}, tmp_path,
  )
  assert_same(converted(two, tmp_path, prefix="generator."), bcm)


def test_an_average_without_names_names_the_others(bcm, tmp_path):
  tree = {"model": bcm, "ema": {"shadow_params": list(bcm.values())}}
  refused("--group: .*'ema'.*--group=model", tree, tmp_path)
  assert_same(converted(tree, tmp_path, group="model"), bcm)


def test_shards(bcm, tmp_path):
  names = sorted(bcm)
  parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  listed = {n: parts[i > len(names) // 2] for i, n in enumerate(names)}
  for part in parts:
    safetensors.numpy.save_file(
        {k: bcm[k] for k in names if listed[k] == part}, tmp_path / part
    )
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": listed}))
  refused("shard 1 of 2", tmp_path / parts[0], tmp_path)
  assert_same(selected(index), bcm)
  index.write_text(json.dumps({"weight_map": listed | {"more": parts[0]}}))
  with pytest.raises(errors.UserError, match="no tensor 'more'"):
    weight_files.read(str(index))
  index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
  with pytest.raises(errors.UserError, match="beside the index"):
    weight_files.read(str(index))
  index.write_text(json.dumps({"weight_map": listed}))
  (tmp_path / parts[1]).unlink()
  with pytest.raises(errors.UserError, match="download it"):
    weight_files.read(str(index))


@pytest.mark.parametrize("content, match", [
    (b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "Git LFS"),
    (b"<!DOCTYPE html><html>sign in</html>", "HTML"),
    (b"\n<html></html>", "HTML"),
    (b'{"error": "Repository not found"}', "weight_map"),
    (b"{" + b"[" * 100_000, "weight_map"),
    (gzip.compress(b"weights", mtime=0), "gzip"),
    (b"", "got 0 bytes"),
])
def test_files_that_hold_no_weights(content, match, tmp_path):
  path = tmp_path / "x.pt"
  path.write_bytes(content)
  refused(match, path, tmp_path)


@pytest.mark.parametrize("place", ["gs://b/x.pt", "https://h/x.pt", "s3://b/x"])
def test_addresses(place, tmp_path):
  refused("address", place, tmp_path)


def test_a_pipe(tmp_path):
  os.mkfifo(tmp_path / "x.pt")
  refused("regular file", tmp_path / "x.pt", tmp_path)


@pytest.mark.parametrize("shard", ["\0", "..", "a/b", "", 3, "absent"])
def test_shards_that_are_no_files(shard, tmp_path):
  path = tmp_path / "x.index.json"
  path.write_text(json.dumps({"weight_map": {"a": shard}}))
  refused("shard|weight_map", path, tmp_path)


def test_a_folder(tmp_path):
  (tmp_path / "weights").mkdir()
  refused("folder", tmp_path / "weights", tmp_path)


# The method -----------------------------------------------------------------


def section_of(source, folder, **options):
  options = {"overrides": {}} | options
  convert.to_workdir(str(source), str(folder / "run"), **options)
  return json.loads((folder / "run" / "config.json").read_text())


def test_a_network_of_edm_may_be_a_student(edm, tmp_path):
  source = torch_writer.save(tmp_path / "network-snapshot.pt", edm)
  refused("--as: .*dmd2.*sid", source, tmp_path, image_size=None, overrides={})


@pytest.mark.parametrize("method, name, sampler, preconditioning", [
    ("edm", "edm", "heun", "edm"), ("dmd", "dmd", None, "edm"),
    ("dmd2", "dmd2", None, "edm"), ("sid", "dmd2", None, "edm"),
    ("ect", "ect", None, "cm"), ("cd", "cd", None, "cm"),
])
def test_as(method, name, sampler, preconditioning, edm, tmp_path):
  source = torch_writer.save(tmp_path / "x.pt", edm)
  made = section_of(source, tmp_path, method=method)
  assert made["method"]["name"] == name
  assert made["method"]["preconditioning"] == preconditioning
  assert (made["sample"]["sampler"] == "heun") == (sampler == "heun")
  high = 2.5 if method == "sid" else 80.0
  assert made["method"]["sigma_max"] == high


@pytest.mark.parametrize("name, method", [
    ("edm-cifar10-32x32-cond-vp.pt", "edm"), ("ect_c10.pt", "ect"),
    ("edm2-img64.pt", "edm"),
])
def test_method_in_the_file_name(name, method, edm, tmp_path):
  source = torch_writer.save(tmp_path / name, edm)
  assert section_of(source, tmp_path)["method"]["name"] == method


@pytest.mark.parametrize("name", ["dmd2_edm.pt", "model.pt", "predmd2x.pt"])
def test_file_names_that_do_not_tell(name, edm, tmp_path):
  source = torch_writer.save(tmp_path / name, edm)
  refused("--as", source, tmp_path, image_size=None, overrides={})


def test_methods_that_do_not_fit(bcm, edm, tmp_path):
  refused("--as: got cd, expected bcm", bcm, tmp_path, method="cd")
  refused("--as: got bcm", edm, tmp_path, method="bcm", overrides={})
  refused("--as", edm, tmp_path, method="emd", overrides={})


def test_image_sizes(bcm, edm, tmp_path):
  refused("--image-size: got none", bcm, tmp_path, image_size=None)
  refused("--image-size: got 64, expected 8", edm, tmp_path, image_size=64,
          method="edm", overrides={})


@pytest.mark.slow
@pytest.mark.parametrize("mult, size, name, method, qkv_norm", [
    ((1, 1, 2, 2, 4, 4), 256, "ct_bedroom256.pt", "ct", False),
    pytest.param((1, 1, 2, 2, 4, 4), 256, "weights.pt", "ict", False,
                 marks=pytest.mark.slow),
    ((1, 2, 3, 4), 64, "edm_imagenet64_ema.pt", "edm", False),
    pytest.param((1, 2, 3, 4), 64, "ict_imagenet64.pt", "ict", True,
                 marks=pytest.mark.slow),
])
def test_networks_of_openai(mult, size, name, method, qkv_norm, tmp_path):
  model = dict(
      name="adm", model_channels=32, channel_mult=mult, num_res_blocks=1,
      attention_resolutions=(32, 16, 8), num_head_channels=32,
  )
  config = resolve.resolve({
      "model": model, "method": {"name": "ict"},
      "data": {"name": "none", "image_shape": (size, size, 3)},
  })
  network = build.build(config, to_train=False).method.network
  tree = traverse_util.unflatten_dict({
      p: np.zeros(s, np.float32)
      for p, s in transfer.shapes(network, size).items()
  })
  tensors = transfer.write_tensors(openai_names, network, size, tree)
  made = section_of(
      torch_writer.save(tmp_path / name, tensors), tmp_path,
      overrides={"model.num_head_channels": "32"},
  )
  assert made["data"].get("image_shape") == [size, size, 3]
  assert made["model"]["attention_resolutions"] == [32, 16, 8]
  assert made["method"]["name"] == method
  assert made["model"]["qkv_norm"] is qkv_norm


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, bcm, tmp_path):
  broken = bcm | {"out.2.bias": np.full_like(bcm["out.2.bias"], value)}
  refused("not finite in 1 tensors, such as out_2/bias", broken, tmp_path)
  with pytest.raises(errors.UserError, match="not finite"):
    runs.check_finite("x", {"a": {"b": np.float32([1, value])}})
