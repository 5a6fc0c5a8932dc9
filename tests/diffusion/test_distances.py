"""Distances, against their definitions and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import distances

C = 0.03
SHAPE = (3, 4, 4, 2)
D = 32


def pair(scale=1.0):
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((2, *SHAPE)).astype(np.float32)
  return a, a + scale * b


def test_closed_forms():
  a, b = pair()
  d = (b - a).astype(np.float64).reshape(3, -1)
  s = (d**2).sum(-1)
  np.testing.assert_allclose(distances.l2(a, b), s / D, rtol=1e-6)
  np.testing.assert_allclose(distances.l1(a, b), np.abs(d).mean(-1), rtol=1e-6)
  huber = np.sqrt(s + C**2) - C
  np.testing.assert_allclose(
      distances.pseudo_huber(a, b, C), huber / np.sqrt(D), rtol=1e-6
  )
  np.testing.assert_allclose(
      distances.pseudo_huber(a, b, C, normalize=False), huber, rtol=1e-6
  )
  np.testing.assert_allclose(
      distances.pseudo_huber(a, b, 0.0, normalize=False), np.sqrt(s), rtol=1e-6
  )


def test_pseudo_huber_limits():
  a, b = pair(1e3)
  norm = np.linalg.norm((a - b).reshape(3, -1), axis=-1)
  np.testing.assert_allclose(
      distances.pseudo_huber(a, b, C), norm / np.sqrt(D), rtol=1e-4
  )
  # Here sqrt(S + c^2) - c would be zero in float32.
  a, b = np.zeros(SHAPE, np.float32), np.full(SHAPE, 1e-7, np.float32)
  np.testing.assert_allclose(
      distances.pseudo_huber(a, b, C), D * 1e-14 / (2 * C * np.sqrt(D)),
      rtol=1e-5,
  )


@pytest.mark.parametrize("c", [0.0, C])
def test_equal_images_are_at_distance_zero_with_no_gradient(c):
  a, _ = pair()
  value, grad = jax.value_and_grad(
      lambda a, b: distances.pseudo_huber(a, b, c).sum()
  )(a, jnp.asarray(a))
  assert value == 0
  np.testing.assert_array_equal(grad, np.zeros(SHAPE))


@pytest.mark.parametrize("c", [0.0, C])
def test_pseudo_huber_gradient(c):
  a, b = pair(0.01)
  grad = jax.grad(
      lambda a: distances.pseudo_huber(a, b, c, normalize=False).sum()
  )(a)
  d = a - b
  s = (d.astype(np.float64) ** 2).sum(axis=(1, 2, 3), keepdims=True)
  np.testing.assert_allclose(grad, d / np.sqrt(s + c**2), rtol=1e-5)


def test_dtypes_are_promoted_and_never_cast_down():
  bf16 = jnp.ones(SHAPE, jnp.bfloat16)
  for distance in (
      distances.l1,
      distances.l2,
      lambda a, b: distances.pseudo_huber(a, b, C),
  ):
    assert distance(bf16, bf16).dtype == jnp.float32
    with jax.enable_x64(True):
      wide = jnp.ones(SHAPE, jnp.float64)
      assert distance(wide, wide).dtype == jnp.float64


def test_huber_constants_of_the_literature():
  assert distances.huber_constant(64 * 64 * 3) == pytest.approx(0.0599, 1e-3)
  assert distances.huber_constant(32 * 32 * 3) == pytest.approx(0.02993, 1e-3)


@pytest.mark.slow
def test_unit_vectors_have_gradients_at_zero():
  x = jnp.asarray([[3.0, -4.0], [0.0, 0.0]])
  unit, pull = jax.vjp(distances.unit, x)
  np.testing.assert_allclose(unit, [[0.6, -0.8], [0, 0]], rtol=1e-6)
  gradient, = pull(jnp.asarray([[1.0, 0.0], [0.0, 0.0]]))
  # (1 - 0.6^2) / 5 and 0.6 * 0.8 / 5.
  np.testing.assert_allclose(gradient, [[0.128, 0.096], [0, 0]], rtol=1e-5)
