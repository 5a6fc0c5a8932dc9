"""Inception-v3: pytorch-fid's numbers, and its parts against plain XLA.

inception.npz has a part of what pytorch-fid's network returns in float64 for
weights and images by recipe: every 8th of the pooled features and every 4th of
the blocks' means. `python -m tests.parity` looks at all of them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import inception
from tests import toys
from tests.parity import features

pytestmark = pytest.mark.slow

REFERENCE = pathlib.Path(__file__).with_name("inception.npz")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def normal(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def evaluated():
  """The network's outputs, the blocks it keeps, and sFID's branch."""
  x = features.recipe_image(1400, (2, 3, 299, 299))
  x = 2 * np.moveaxis(x, 1, -1) - 1
  return features.network()(features.params("", "float32"), jnp.asarray(x))


def test_pooled_features_are_those_of_pytorch_fid(evaluated):
  out, blocks, _ = evaluated
  ours = {"pool3": out.pooled[:, ::8]}
  ours |= {name: value[:, ::4] for name, value in blocks.items()}
  with np.load(REFERENCE) as file:
    assert set(file.files) == set(ours)
    for name in file.files:
      scale = np.abs(file[name]).max()
      np.testing.assert_allclose(ours[name], file[name], rtol=0,
                                 atol=5e-6 * scale)


def test_spatial_features_are_seven_channels_of_one_branch(evaluated):
  out, _, branch = evaluated
  assert branch.shape == (2, 17, 17, 192) and float(branch.min()) == 0
  assert out.spatial.shape == (2, 2023)
  np.testing.assert_array_equal(
      out.spatial.reshape(2, 17, 17, 7), branch[..., :7]
  )


def test_logits_with_and_without_bias(evaluated):
  out, _, _ = evaluated
  fc = features.params("", "float32")["fc"]
  unbiased = np.float64(out.pooled) @ np.float64(fc["kernel"])
  assert unbiased.shape == (2, 1008)
  limit = toys.rounding(2048)
  toys.assert_close(out.unbiased_logits, unbiased, limit)
  toys.assert_close(out.logits, unbiased + fc["bias"], limit)


@pytest.mark.parametrize("given, expected", [
    ("bfloat16", "float32"), ("float64", "float64"),
])
def test_computes_in_float32_or_wider(given, expected):
  with jax.enable_x64(given == "float64"):
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), given)
    params = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, given),
        features.params("", "float32"),
    )
    out = jax.eval_shape(
        lambda p, x: inception.InceptionV3().apply({"params": p}, x), params, x
    )
  assert {v.dtype.name for v in out} == {expected}


@pytest.mark.parametrize("kernel, stride, padding", [
    ((1, 1), 1, "SAME"), ((3, 3), 1, "VALID"), ((3, 3), 2, "VALID"),
    ((1, 7), 1, "SAME"), ((5, 5), 1, "SAME"),
])
@pytest.mark.parametrize("size", [9, 10])
def test_layer_is_convolution_norm_relu(kernel, stride, padding, size):
  x = normal(2, size, size + 2, 5)
  layer = inception.ConvNorm(4, kernel, stride, padding)
  params = {
      "kernel": normal(*kernel, 5, 4), "scale": normal(4) + 2,
      "bias": normal(4), "mean": normal(4) - 1, "var": normal(4) ** 2,
  }
  y = jax.lax.conv_general_dilated(
      x, params["kernel"], (stride, stride), padding,
      dimension_numbers=DIMENSIONS,
  )
  y = (y - params["mean"]) / np.sqrt(params["var"] + 1e-3)
  expected = np.maximum(y * params["scale"] + params["bias"], 0)
  ours = layer.apply({"params": params}, x)
  assert 0 < np.mean(expected == 0) < 1
  terms = 5 * kernel[0] * kernel[1]
  toys.assert_close(ours, expected, toys.rounding(terms + 10))


def test_averages_commute_with_the_convolution():
  """Averages come first in the original, and leave the padding out."""
  x = normal(2, 6, 5, 3)

  def window_sums(v):
    return jax.lax.reduce_window(
        v, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    )

  averaged = window_sums(x) / window_sums(np.ones_like(x))
  params = {"params": {
      "kernel": normal(1, 1, 3, 4), "scale": normal(4), "bias": normal(4),
      "mean": normal(4), "var": normal(4) ** 2,
  }}
  expected = inception.ConvNorm(4).apply(params, averaged)
  ours = inception.ConvNorm(4, average=True).apply(params, x)
  toys.assert_close(ours, expected, toys.rounding(3 * 9 + 10))


@pytest.mark.parametrize("stride, padding", [(2, None), (1, -np.inf)])
@pytest.mark.parametrize("size", [7, 8])
def test_largest_of_nine(stride, padding, size):
  # All below 0, so that a frame of zeros would show.
  x = -np.abs(normal(2, size, size + 1, 3))
  expected = jax.lax.reduce_window(
      x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1),
      "VALID" if padding is None else "SAME",
  )
  ours = inception._max_pool(x, stride, padding)
  np.testing.assert_array_equal(ours, expected)


def test_number_of_parameters():
  params = features.params("", "float32")
  leaves = jax.tree_util.tree_leaves_with_path(params)
  trained = [v.size for p, v in leaves if p[-1].key not in ("mean", "var")]
  # Torchvision's without the auxiliary classifier, and eight classes more.
  assert sum(trained) == 23_834_568 + 8 * (2048 + 1)
