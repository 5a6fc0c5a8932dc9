"""LPIPS: the numbers of the package `lpips`, gradients, what is refused.

lpips.npz has what the package returns in float64 (see make_lpips.py).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.interop.families import vgg_names
from bcm_jax.metrics import lpips
from bcm_jax.models import vgg
from tests.metrics import lpips_recipe

REFERENCE = pathlib.Path(__file__).with_name("lpips.npz")


@pytest.fixture(scope="module")
def params():
  return vgg_names.to_params({
      entry.name: lpips_recipe.tensor(
          entry.name, entry.layout.to_torch(np.broadcast_to(0, shape)).shape
      )
      for entry, shape in vgg_names.table()
  })


@pytest.fixture(scope="module")
def derived():
  """(params, x, y) -> distances, gradient of their sum at x; in float64."""

  def total(x, params, y):
    each = lpips.distance(params, x, y)
    return each.sum(), each

  function = jax.jit(jax.grad(total, has_aux=True))

  def run(params, x, y):
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda v: jnp.asarray(v, "float64"), (x, params, y))
      gradient, each = function(*wide)
    return each, gradient

  return run


@pytest.mark.slow
def test_reproduces_the_package(params, derived):
  each, gradient = derived(params, *lpips_recipe.images())
  assert each.dtype == np.float64
  with np.load(REFERENCE) as file:
    np.testing.assert_allclose(each, file["distance"], rtol=1e-12)
    theirs = file["gradient"]
  ours = gradient[:, ::6, ::6]
  for i in range(2):
    np.testing.assert_allclose(
        ours[i], theirs[i], atol=1e-10 * np.abs(theirs[i]).max()
    )


@pytest.mark.slow
def test_pooling_may_be_of_means(params):
  x, y = lpips_recipe.images()
  shift, scale = np.array(lpips._SHIFT), np.array(lpips._SCALE)
  total = 0.0
  features = [
      vgg.VGG16("average").apply({"params": params["vgg"]}, (v - shift) / scale)
      for v in (x, y)
  ]
  for i, (a, b) in enumerate(zip(*features, strict=True)):
    a, b = (
        v / np.linalg.norm(v, axis=-1, keepdims=True).clip(1e-10)
        for v in (np.asarray(a), np.asarray(b))
    )
    weighted = (a - b) ** 2 @ np.asarray(params["linear"][f"lin{i}"])
    total += weighted.mean(axis=(1, 2))
  found = lpips.distance(params, x, y, "average")
  np.testing.assert_allclose(found, total, rtol=1e-4)
  assert np.all(np.abs(found / lpips.distance(params, x, y) - 1) > 1e-3)


def test_black_features_are_no_difference(params, derived):
  # So low that no ReLU lets anything through.
  black = {
      name: layer | {"bias": layer["bias"] - 1e4}
      for name, layer in params["vgg"].items()
  }
  each, gradient = derived(params | {"vgg": black}, *lpips_recipe.images())
  np.testing.assert_array_equal(each, 0)
  np.testing.assert_array_equal(gradient, 0)


def test_is_a_distance_of_each_pair(params):
  x, y = lpips_recipe.images()
  forth = lpips.distance(params, x, y)
  assert forth.shape == (2,) and forth.dtype == np.float32
  with np.load(REFERENCE) as file:
    np.testing.assert_allclose(forth, file["distance"], rtol=1e-5)
  np.testing.assert_allclose(lpips.distance(params, y, x), forth, rtol=1e-5)
  np.testing.assert_allclose(lpips.distance(params, x, x), 0, atol=1e-12)
  np.testing.assert_allclose(
      lpips.distance(params, x[::-1], y[::-1])[::-1], forth, rtol=1e-5
  )


def test_grey_is_three_equal_channels(params):
  x, y = lpips_recipe.images()[..., :1]
  grey = lpips.distance(params, x, y)
  colour = lpips.distance(params, *(np.repeat(v, 3, axis=-1) for v in (x, y)))
  assert np.all(np.asarray(grey) > 0)
  np.testing.assert_allclose(grey, colour, rtol=1e-5)


@pytest.mark.parametrize("x, y, words", [
    ((2, 15, 16, 3), (2, 15, 16, 3), "15x16 pixels, expected at least 16"),
    ((2, 16, 16, 3), (1, 16, 16, 3), "expected equal shapes"),
    ((2, 16, 16, 4), (2, 16, 16, 4), "with 3 channels, or 1"),
    ((16, 16, 3), (16, 16, 3), r"expected equal shapes \[n, H, W, C\]"),
])
def test_shapes_are_checked(params, x, y, words):
  with pytest.raises(UserError, match=words):
    lpips.distance(params, jnp.zeros(x), jnp.zeros(y))


def test_integers_are_refused(params):
  x = jnp.zeros((1, 16, 16, 3), jnp.uint8)
  with pytest.raises(UserError, match=r"uint8, expected floats in \[-1, 1\]"):
    lpips.distance(params, x, x)


def test_small_images_are_enlarged_and_others_are_not():
  assert lpips.enlarge(jnp.zeros((2, 32, 16, 3))).shape == (2, 224, 224, 3)
  large = jnp.zeros((1, 224, 100, 3))
  assert lpips.enlarge(large) is large
