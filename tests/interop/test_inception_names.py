"""Names of Inception's published weights: both directions, and what is wrong.
"""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.interop import weight_files
from bcm_jax.interop.families import inception_names
from tests.interop import craft
from tests.parity import features

COUNTER = "Mixed_5b.branch1x1.bn.num_batches_tracked"
UNUSED = {
    COUNTER: np.array(7), "AuxLogits.fc.weight": np.ones((1000, 768)),
    "AuxLogits.conv0.bn.running_var": np.ones(128),
}


@pytest.fixture(scope="module")
def tensors():
  """A state dict; the network's 94 convolutions would be 95 MB in float32."""
  return {k: v.astype(np.float16) for k, v in features.state_dict().items()}


@pytest.mark.slow
def test_there_and_back(tensors):
  back = inception_names.to_state_dict(inception_names.to_params(tensors))
  assert back.keys() == tensors.keys() and len(back) == 94 * 5 + 2
  for name, value in tensors.items():
    assert back[name].dtype == value.dtype
    np.testing.assert_array_equal(back[name], value)


def test_layouts(tensors):
  params = inception_names.to_params(tensors)
  layer = params["Mixed_6c"]["branch7x7dbl_2"]
  theirs = "Mixed_6c.branch7x7dbl_2"
  weight = tensors[f"{theirs}.conv.weight"]
  assert weight.shape == (160, 160, 7, 1)
  assert layer["kernel"][5, 0, 3, 8] == weight[8, 3, 5, 0]
  for ours, name in (("scale", "weight"), ("bias", "bias"),
                     ("mean", "running_mean"), ("var", "running_var")):
    assert layer[ours][9] == tensors[f"{theirs}.bn.{name}"][9]
  assert params["fc"]["kernel"][2000, 7] == tensors["fc.weight"][7, 2000]
  assert params["fc"]["bias"][7] == tensors["fc.bias"][7]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files(tensors, tmp_path, suffix):
  path = str(tmp_path / f"inception{suffix}")
  write = craft.save if suffix == ".pt" else weight_files.write
  write(path, tensors | UNUSED)
  params = inception_names.load_inception(path)
  np.testing.assert_array_equal(
      params["Mixed_7c"]["branch_pool"]["var"],
      tensors["Mixed_7c.branch_pool.bn.running_var"],
  )


def test_errors_say_what_is_missing(tensors, tmp_path):
  partly = dict(tensors)
  del partly["Mixed_7a.branch3x3_1.bn.running_mean"]
  partly["Mixed_8a.conv.weight"] = np.ones(3)
  with pytest.raises(UserError) as e:
    inception_names.to_params(partly)
  assert "missing: Mixed_7a.branch3x3_1.bn.running_mean;" in str(e.value)
  assert "unexpected: Mixed_8a.conv.weight" in str(e.value)

  path = str(tmp_path / "other.safetensors")
  weight_files.write(path, {"features.0.weight": np.ones(3)})
  with pytest.raises(UserError) as e:
    inception_names.load_inception(path)
  assert str(e.value).startswith(f"{path}: tensors: expected the weights of")
  assert "and 464 more; unexpected: features.0.weight" in str(e.value)


def test_a_thousand_classes_are_another_network(tensors):
  other = tensors | {"fc.weight": np.ones((1000, 2048))}
  with pytest.raises(UserError, match=r"'fc.weight': got shape \(1000, 2048\)"):
    inception_names.to_params(other)
