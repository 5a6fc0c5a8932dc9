"""The ResNet of features: shapes, sizes, norms, and what depends on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import layers
from bcm_jax.models import resnet
from tests import quick

SHAPES = [
    (8, 8, 1), (9, 13, 3), (12, 8, 2), (16, 16, 3), (28, 28, 1), (32, 32, 3),
    (64, 48, 3),
]


def random_params(network, shape, seed=0):
  """Weights away from zero, where some start; made without compiling."""
  _, _, variables = abstract(network, jnp.zeros((1, *shape)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32),
      variables["params"],
  )


def abstract(network, images):
  """Shapes of parameters and outputs; nothing is computed."""
  def f():
    return network.init_with_output(jax.random.key(0), images)

  (features, logits), variables = jax.eval_shape(f)
  return features.shape, logits.shape, variables


@pytest.fixture(scope="module")
def small():
  """(images -> features and logits, parameters) for three 10x11 images."""
  network = resnet.ResNet(3, (8, 16), stem_stride=2)
  params = random_params(network, (10, 11, 3))
  return quick.jit(lambda x: network.apply({"params": params}, x)), params


def pixels(seed, *shape):
  return np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_image_gives_features_and_logits(shape):
  network = resnet.for_images(shape, 7)
  features, logits, variables = abstract(network, jnp.zeros((2, *shape)))
  assert features == (2, 128)
  assert logits == (2, 7)
  # Nothing but parameters: no moving statistics.
  assert set(variables) == {"params"}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_stage_has_four_to_eight_pixels_a_side(shape):
  network = resnet.for_images(shape, 7)
  side = -(-min(shape[:2]) // network.stem_stride)
  for _ in network.widths[1:]:
    side = -(-side // 2)
  assert 4 <= side <= 8


def test_attributes_make_the_network():
  images = jnp.zeros((1, 16, 16, 3))
  network = resnet.ResNet(5, (8, 16, 24, 40), blocks=2)
  features, logits, variables = abstract(network, images)
  assert (features, logits) == ((1, 40), (1, 5))
  blocks = {k for k in variables["params"] if k.startswith("stage")}
  assert blocks == {f"stage{s}_block{b}" for s in range(4) for b in range(2)}
  assert variables["params"]["stem"]["kernel"].shape == (3, 3, 3, 8)


@pytest.mark.parametrize("width", [8, 24, 32, 48, 64, 96, 128, 256])
def test_groups_divide_the_width_and_are_not_single_channels(width):
  x = jnp.zeros((1, 8, 8, width))
  network = resnet.ResNet(2, (width,))
  found = []

  def record(next_call, args, kwargs, context):
    if isinstance(context.module, layers.GroupNorm):
      found.append(context.module.num_groups)
    return next_call(*args, **kwargs)

  with resnet.nn.intercept_methods(record):
    abstract(network, x)
  assert len(found) == 3
  for groups in found:
    assert width % groups == 0
    assert width // groups >= 4


@pytest.mark.parametrize("stride", [2, 3])
def test_every_pixel_counts(stride):
  network = resnet.ResNet(2, (8,), stem_stride=stride)
  side = 4 * stride
  params = random_params(network, (side, side, 1))

  def total(x):
    features, _ = network.apply({"params": params}, x)
    return jnp.sum(features * jnp.arange(1.0, 9.0))

  gradient = quick.jit(jax.grad(total))(pixels(0, 1, side, side, 1))
  assert np.all(np.asarray(gradient) != 0)


def test_an_image_depends_on_no_other(small):
  apply, _ = small
  x, other = pixels(0, 3, 10, 11, 3), pixels(1, 3, 10, 11, 3)
  other[1] = x[1]
  for a, b in zip(apply(x), apply(other), strict=True):
    np.testing.assert_array_equal(a[1], b[1])
    assert np.abs(a[0] - b[0]).max() > 0.01


def test_logits_are_linear_in_features(small):
  apply, params = small
  features, logits = apply(pixels(0, 3, 10, 11, 3))
  dense = params["logits"]
  np.testing.assert_allclose(
      features @ dense["kernel"] + dense["bias"], logits, rtol=1e-4, atol=1e-5
  )


def test_blocks_start_as_their_shortcuts():
  block = resnet.Block(16)
  x = pixels(0, 2, 5, 6, 16)
  init = quick.jit(lambda: block.init_with_output(jax.random.key(1), x))
  np.testing.assert_array_equal(init()[0], x)
