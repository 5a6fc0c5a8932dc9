"""VGG16: shapes of its blocks, and convolutions of tiny maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import vgg
from tests import toys


@pytest.mark.parametrize("height, width", [(16, 16), (31, 40), (64, 47)])
def test_five_blocks_each_half_as_large(height, width):
  x = jnp.zeros((2, height, width, 3), jnp.bfloat16)
  out, params = jax.eval_shape(
      lambda: vgg.VGG16().init_with_output(jax.random.key(0), x)
  )
  sizes = [(height >> i, width >> i) for i in range(5)]
  assert [v.shape[1:3] for v in out] == sizes
  assert [v.shape[-1] for v in out] == [64, 128, 256, 512, 512]
  assert {v.dtype for v in out} == {jnp.dtype("float32")}
  # Torchvision's 138,357,544 without the classifier's 123,642,856.
  count = sum(v.size for v in jax.tree.leaves(params))
  assert count == 138_357_544 - 123_642_856


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 4), (3, 3), (4, 2)])
def test_convolution_of_small_maps(size):
  rng = np.random.default_rng(0)
  x, kernel, bias = (
      rng.standard_normal(shape, np.float32)
      for shape in ((2, *size, 5), (3, 3, 5, 7), 7)
  )
  # By hand: shifted images times slices of the kernel.
  frame = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  expected = sum(
      frame[:, i : i + size[0], j : j + size[1]] @ kernel[i, j]
      for i in range(3) for j in range(3)
  ) + bias
  params = {"params": {"kernel": kernel, "bias": bias}}
  toys.assert_close(
      vgg.Conv(7).apply(params, x), expected, toys.rounding(9 * 5 + 10)
  )


@pytest.mark.parametrize("pooling, expected", [
    ("max", [[-1, -3]]), ("average", [[-4, -6]]),
])
def test_pooling_drops_an_odd_edge(pooling, expected):
  x = -np.arange(1.0, 16.0, dtype=np.float32).reshape(1, 3, 5, 1)
  np.testing.assert_array_equal(vgg._halve(x, pooling)[0, ..., 0], expected)
