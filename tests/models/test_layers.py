"""Layers: PyTorch's initialisation, attention, dropout keyed by example."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import layers
from tests import toys

HEADS, DIM, POSITIONS = 2, 8, 12


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv():
  return normal(0, 3, 2, POSITIONS, HEADS, DIM)


class Convolution(nn.Module):
  zero: bool = False

  @nn.compact
  def __call__(self, x):
    return layers.conv(x, 64, 3, name="conv", zero=self.zero)


class Linear(nn.Module):
  zero: bool = False

  @nn.compact
  def __call__(self, x):
    return layers.linear(x, 300, name="linear", zero=self.zero)


class TwoDropouts(nn.Module):

  @nn.compact
  def __call__(self, x, keys):
    return [
        layers.Dropout(0.3, name="a")(x, keys),
        layers.Dropout(0.3, name="b")(x, keys),
    ]


@pytest.mark.parametrize("module, shape, fan_in", [
    (Convolution, (1, 4, 4, 8), 72), (Linear, (1, 200), 200),
])
def test_initialisation_is_that_of_pytorch(module, shape, fan_in):
  x = jnp.ones(shape)
  params = jax.tree.leaves(module().init(jax.random.key(0), x))
  bias, kernel = sorted(params, key=jnp.size)
  limit = fan_in**-0.5
  for v in (bias, kernel):
    assert v.dtype == jnp.float32
    assert 0.9 * limit < float(jnp.abs(v).max()) <= limit
    assert float(v.min()) < -0.9 * limit
  assert float(kernel.std()) == pytest.approx(limit / np.sqrt(3), rel=0.05)
  for v in jax.tree.leaves(module(zero=True).init(jax.random.key(0), x)):
    assert not v.any()


def test_group_norm_by_its_definition():
  # A large mean, against which E[x^2] - E[x]^2 would lose all digits.
  x = 3000 + normal(0, 2, 4, 4, 6)

  class Norm(nn.Module):

    @nn.compact
    def __call__(self, x):
      return layers.group_norm(x, 3, name="norm")

  out = Norm().apply(Norm().init(jax.random.key(0), x), x)
  wide = x.astype(np.float64).reshape(2, 16, 3, 2)
  mean = wide.mean((1, 3), keepdims=True)
  variance = wide.var((1, 3), keepdims=True)
  expected = (wide - mean) / np.sqrt(variance + 1e-5)
  np.testing.assert_allclose(out, expected.reshape(x.shape), atol=2e-3)

  small = 1e-3 * normal(1, 2, 4, 4, 6)
  out = Norm().apply(Norm().init(jax.random.key(0), small), small)
  wide = small.astype(np.float64).reshape(2, 16, 3, 2)
  expected = (wide - wide.mean((1, 3), keepdims=True)) / np.sqrt(
      wide.var((1, 3), keepdims=True) + 1e-5
  )
  np.testing.assert_allclose(out, expected.reshape(x.shape), rtol=1e-3,
                             atol=1e-4)
  bf16 = jnp.asarray(x, jnp.bfloat16)
  params = Norm().init(jax.random.key(0), bf16)
  out = Norm().apply(params, bf16)
  assert out.dtype == jnp.bfloat16
  wide = Norm().apply(params, bf16.astype(jnp.float32))
  # Where float32 rounds elsewhere, the neighbor in bfloat16.
  toys.assert_close(out.astype(np.float32), wide, 2.0**-8)


def test_unit_rms():
  x = qkv()[0]
  out = layers.unit_rms(x)
  rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True))
  np.testing.assert_allclose(out, x / (rms + 1e-4), rtol=1e-5)
  np.testing.assert_allclose(
      np.sqrt((np.asarray(out) ** 2).mean(-1)), 1, atol=1e-3
  )
  # The 1e-4 keeps zeros zero, and matters where the norm is as small.
  assert not layers.unit_rms(0 * x).any()
  np.testing.assert_allclose(
      layers.unit_rms(jnp.full((1, 4), 1e-4)), 0.5, rtol=1e-5
  )


def weights_of(q, k):
  """Attention weights [B, heads, N, N]: one-hot values read them out."""
  eye = np.eye(POSITIONS, dtype=np.float32)
  v = np.broadcast_to(eye[None, :, None], (2, POSITIONS, HEADS, POSITIONS))
  return np.moveaxis(np.asarray(layers.attention(q, k, jnp.asarray(v))), 1, 2)


def test_attention_is_softmax_attention():
  q, k, v = qkv()
  logits = np.einsum("bqhd,bkhd->bhqk", *(a.astype(np.float64) for a in (q, k)))
  w = np.exp(logits / np.sqrt(DIM))
  w /= w.sum(-1, keepdims=True)
  toys.assert_close(weights_of(q, k), w)
  toys.assert_close(
      layers.attention(q, k, v), np.einsum("bhqk,bkhd->bqhd", w, v)
  )
  for dtype, rtol in ((jnp.bfloat16, 0.02), (jnp.float16, 0.002)):
    out = layers.attention(*(jnp.asarray(a, dtype) for a in (q, k, v)))
    assert out.dtype == dtype
    toys.assert_close(
        out.astype(np.float32), layers.attention(q, k, v), rtol
    )


def test_normalised_logits_are_bounded():
  q = 100 * qkv()[0]
  w = np.log(weights_of(layers.unit_rms(q), layers.unit_rms(q)))
  # Logits lie in [-sqrt(d), sqrt(d)], and a position agrees with itself best.
  spread = w.max(-1) - w.min(-1)
  assert spread.max() <= 2 * np.sqrt(DIM) * 1.001
  np.testing.assert_array_equal(
      w.argmax(-1), np.broadcast_to(np.arange(POSITIONS), w.shape[:-1])
  )


@pytest.mark.parametrize("qkv_norm", [True, False])
def test_attention_block(qkv_norm):
  block = layers.AttentionBlock(HEADS, (4, 1), qkv_norm)
  x = normal(0, 2, 3, 4, 16)
  fresh = block.init(jax.random.key(0), x)
  np.testing.assert_array_equal(block.apply(fresh, x), x)

  leaves, tree = jax.tree.flatten(fresh)
  params = jax.tree.unflatten(
      tree, [normal(i, *v.shape) / 2 for i, v in enumerate(leaves)]
  )
  out = block.apply(params, x)
  assert np.abs(out - x).max() > 0.1
  order = np.random.default_rng(0).permutation(12)
  shuffled = x.reshape(2, 12, 16)[:, order].reshape(x.shape)
  toys.assert_close(
      block.apply(params, shuffled).reshape(2, 12, 16),
      out.reshape(2, 12, 16)[:, order],
  )
  # Normalisation makes the scale of q, k and v immaterial.
  larger = jax.tree.map(lambda v: v, params)
  larger["params"]["qkv"] = jax.tree.map(
      lambda v: 5 * v, params["params"]["qkv"]
  )
  change = np.abs(block.apply(larger, x) - out).max()
  assert change < 1e-2 if qkv_norm else change > 0.1


def dropout(x, keys, rate=0.3):
  return layers.Dropout(rate).apply({}, x, keys)


@pytest.mark.slow
def test_dropout_mask_of_an_example_is_its_own():
  keys = jax.random.split(jax.random.key(0), 4)
  x = jnp.ones((4, 10, 10, 3))
  together = dropout(x, keys)
  for part in (slice(0, 1), slice(1, 4), slice(2, 3)):
    np.testing.assert_array_equal(together[part], dropout(x[part], keys[part]))
  np.testing.assert_array_equal(together, dropout(x, keys))
  np.testing.assert_array_equal(together[::-1], dropout(x, keys[::-1]))
  masks = np.asarray(together).reshape(4, -1) > 0
  assert len(np.unique(masks, axis=0)) == 4
  assert masks.mean() == pytest.approx(0.7, abs=0.05)
  np.testing.assert_allclose(np.unique(together), [0, 1 / 0.7], rtol=1e-6)


def test_dropout_differs_between_layers():
  keys = jax.random.split(jax.random.key(0), 2)
  x = jnp.ones((2, 10, 10, 3))
  a, b = TwoDropouts().apply({}, x, keys)
  assert 0.3 < ((a > 0) != (b > 0)).mean() < 0.55
  again = TwoDropouts().apply({}, x, keys)
  np.testing.assert_array_equal(a, again[0])
  np.testing.assert_array_equal(b, again[1])


def test_dropout_is_off_without_keys_or_rate():
  keys = jax.random.split(jax.random.key(0), 2)
  x = normal(0, 2, 5)
  np.testing.assert_array_equal(dropout(x, None), x)
  np.testing.assert_array_equal(dropout(x, keys, rate=0.0), x)
