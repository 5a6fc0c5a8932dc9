"""Inception features: both resizings, what is told, and how it is batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import inception as metric
from tests.parity import features

# Rows 0, 1, 100, 205 and 298 of a column of `size` pixels 37 i % 256 at 299
# pixels, by tf.compat.v1.image.resize_bilinear of TensorFlow 2.21 and by
# torch.nn.functional.interpolate of PyTorch 2.13, both in float32.
COLUMNS = {
    ("tf1", 28): (0.0, 3.4648829, 90.4883041, 198.3010101, 231.0),
    ("tf1", 64): (0.0, 7.9197326, 23.9732399, 87.5450745, 27.0),
    ("tf1", 1024): (0.0, 126.7157211, 127.5718384, 120.7212524, 129.2844849),
    ("torch", 28): (0.0, 0.0, 73.7207336, 181.5334167, 231.0),
    ("torch", 64): (0.0, 0.0, 9.4330997, 73.0050049, 27.0),
    ("torch", 1024): (44.8578606, 171.5735779, 172.4295959, 165.5801392,
                      174.1411133),
}


def images(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("resize, size", COLUMNS)
@pytest.mark.parametrize("axis", [1, 2])
def test_resizes_as_tensorflow_and_pytorch_do(resize, size, axis):
  column = (37 * np.arange(size) % 256).reshape(1, size, 1, 1)
  other = 3 - axis
  if axis == 2:
    column = column.swapaxes(1, 2)
  seen = np.asarray(metric.preprocess(column.astype(np.uint8), resize))
  assert seen.shape == (1, 299, 299, 3) and seen.dtype == np.float32
  # Constant along the other axis, and grey.
  assert np.ptp(seen, axis=other).max() < 1e-5 and np.ptp(seen, -1).max() == 0
  grey = seen.take(0, axis=other)[0, :, 0]
  grey = 128 * grey + 128 if resize == "tf1" else 127.5 * (grey + 1)
  np.testing.assert_allclose(
      grey[[0, 1, 100, 205, 298]], COLUMNS[resize, size], atol=5e-5
  )


@pytest.mark.parametrize("resize", metric.NAMES)
@pytest.mark.parametrize("size", [1, 2, 32, 299, 500])
def test_resizing_keeps_what_is_constant(resize, size):
  matrix = metric.resize_matrix(size, resize)
  assert matrix.shape == (299, size) and matrix.min() >= 0
  np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)
  assert np.count_nonzero(matrix, axis=1).max() <= 2
  if size == 299:
    np.testing.assert_array_equal(matrix, np.eye(299))


def test_ranges_of_both_ways():
  ends = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
  tf1, torch = (
      metric.preprocess(ends, resize)[:, 0, 0, 0] for resize in ("tf1", "torch")
  )
  np.testing.assert_array_equal(tf1, [-1, 127 / 128])
  np.testing.assert_array_equal(torch, [-1, 1])


def test_float64_stays():
  with jax.enable_x64(True):
    x = jnp.linspace(0, 255, 7, dtype=jnp.float64).reshape(1, 7, 1, 1)
    seen = metric.preprocess(x, "torch")
    assert seen.dtype == jnp.float64
    matrix = metric.resize_matrix(7, "torch", np.float64)
    expected = matrix @ np.linspace(-1, 1, 7)
    np.testing.assert_allclose(seen[0, :, 0, 0], expected, atol=1e-13)


@pytest.mark.slow
def test_features_of_a_network_with_recipe_weights():
  params = features.params("", "float32")
  given = images(5, 20, 24, 3)
  taken = metric.inception_features(params, batch_size=4)
  ours = taken(given)
  assert [v.shape for v in ours] == [(5, 2048), (5, 2023), (5, 1008)]

  pair = given[[0, 4]]
  out, _, _ = features.network()(params, metric.preprocess(pair, "tf1"))
  # Without the classifier's bias.
  logits = np.float64(out.pooled) @ np.float64(params["fc"]["kernel"])
  chances = np.exp(logits - logits.max(axis=1, keepdims=True))
  chances /= chances.sum(axis=1, keepdims=True)
  for expected, actual in zip((out.pooled, out.spatial, chances), ours,
                              strict=True):
    np.testing.assert_allclose(
        actual[[0, 4]], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_both_are_fid_and_tell_themselves_apart():
  params = {"w": np.ones(3, np.float32)}
  tf1, torch = (
      metric.inception_features(params, resize) for resize in ("tf1", "torch")
  )
  assert tf1.distance == torch.distance == "FID"
  assert tf1.name == "Inception, TF1 resizing"
  assert torch.name == "Inception, PyTorch resizing"
  others = metric.inception_features({"w": np.zeros(3, np.float32)})
  assert len({tf1.digest, torch.digest, others.digest}) == 3
  assert metric.inception_features(params).digest == tf1.digest


@pytest.mark.parametrize("call, words", [
    (lambda: metric.preprocess(images(1, 8, 8, 4), "tf1"), "3 channels, or 1"),
    (
        lambda: metric.preprocess(images(1, 8, 8, 3), "pil"),
        "resizing: got 'pil'",
    ),
    (lambda: metric.inception_features({}, "tf"), "did you mean 'tf1'"),
])
def test_bad_input_is_a_user_error(call, words):
  with pytest.raises(UserError, match=words):
    call()
