"""Names of the weights of LPIPS: two files or one, and what is wrong."""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.interop import weight_files
from bcm_jax.interop.families import vgg_names
from tests.interop import craft

BLOCKS = (4, 9, 16, 23)


@pytest.fixture(scope="module")
def tensors():
  rng = np.random.default_rng(0)
  return {
      entry.name: rng.random(
          entry.layout.to_torch(np.broadcast_to(0, shape)).shape, np.float32
      ).astype(np.float16)
      for entry, shape in vgg_names.table()
  }


def as_lpips(tensors):
  """The names in the state dict of a whole lpips.LPIPS."""
  whole = {"scaling_layer.shift": np.ones((1, 3, 1, 1))}
  for name, value in tensors.items():
    if name.startswith("features"):
      number = name.split(".")[1]
      block = 1 + sum(int(number) >= first for first in BLOCKS)
      whole[name.replace("features", f"net.slice{block}")] = value
    else:
      whole[name] = value
      whole[f"lins.{name[3:]}"] = value
  return whole


def same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name])


def test_there_and_back(tensors):
  assert len(tensors) == 13 * 2 + 5
  same(vgg_names.to_state_dict(vgg_names.to_params(tensors)), tensors)


def test_layouts(tensors):
  params = vgg_names.to_params(tensors)
  theirs = tensors["features.28.weight"]
  assert params["vgg"]["features_28"]["kernel"][0, 2, 3, 4] == (
      theirs[4, 3, 0, 2]
  )
  np.testing.assert_array_equal(
      params["linear"]["lin2"], tensors["lin2.model.1.weight"][0, :, 0, 0]
  )


def test_two_files_or_one(tensors, tmp_path):
  def write(name, content):
    path = str(tmp_path / name)
    write = craft.save if name.endswith(".pt") else weight_files.write
    write(path, content)
    return path

  parts = [
      {n: v for n, v in tensors.items() if n.startswith(s)}
      for s in ("features", "lin")
  ]
  parts[0]["classifier.6.bias"] = np.ones(1000)
  ways = (
      [write("vgg16.pt", parts[0]), write("vgg.safetensors", parts[1])],
      [write("both.safetensors", tensors)],
      [write("whole.pt", as_lpips(tensors))],
  )
  for paths in ways:
    same(vgg_names.to_state_dict(vgg_names.load_lpips(*paths)), tensors)
  with pytest.raises(UserError) as e:
    vgg_names.load_lpips(ways[0][0])
  assert str(e.value).startswith(f"{ways[0][0]}: tensors: ")
  assert "missing: lin0.model.1.weight, lin1.model.1.weight" in str(e.value)
  assert "unexpected" not in str(e.value)


def test_groups_that_share_names_are_refused(tensors, tmp_path, monkeypatch):
  twice = {"model": tensors, "ema": tensors}
  monkeypatch.setattr(
      weight_files, "read",
      lambda path: weight_files.WeightFile("torch_zip", twice, {}),
  )
  with pytest.raises(UserError, match="a.pt: got .* in 'ema'"):
    vgg_names.load_lpips("a.pt")


@pytest.mark.parametrize("name, value, words", [
    ("lin1.model.1.weight", -np.ones((1, 128, 1, 1)), "negative .* lin1"),
    ("features.0.weight", np.ones((64, 4, 3, 3)), r"expected \(64, 3, 3, 3\)"),
    ("features.1.weight", np.ones(3), "unexpected: features.1.weight"),
])
def test_other_weights_are_refused(tensors, name, value, words):
  with pytest.raises(UserError, match=words):
    vgg_names.to_params(tensors | {name: value})
