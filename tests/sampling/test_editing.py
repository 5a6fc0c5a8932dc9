"""Spherical interpolation between latents."""

import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.sampling import editing


def pair(n=4):
  rng = np.random.default_rng(0)
  return 80 * rng.standard_normal((2, n, 4, 4, 2)).astype(np.float32)


def norms(x):
  return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=-1)


def test_ends():
  a, b = pair()
  np.testing.assert_allclose(editing.slerp(a, b, jnp.zeros(4)), a, rtol=1e-6)
  np.testing.assert_allclose(
      editing.slerp(a, b, jnp.ones(4)), b, rtol=1e-5, atol=1e-4
  )


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_equal_norms_are_kept_and_angles_divided(weight):
  a, b = pair()
  b = b * (norms(a) / norms(b))[:, None, None, None].astype(np.float32)
  out = editing.slerp(a, b, jnp.full(4, weight))
  np.testing.assert_allclose(norms(out), norms(a), rtol=1e-5)
  # A straight line would cut the corner.
  assert (norms((a + b) / 2) < 0.9 * norms(a)).all()

  def angle(p, q):
    p, q = (np.asarray(v, np.float64).reshape(4, -1) for v in (p, q))
    return np.arccos((p * q).sum(-1) / norms(p) / norms(q))

  np.testing.assert_allclose(angle(a, out), weight * angle(a, b), rtol=1e-4)


def test_each_image_has_its_own_weight():
  a, b = pair()
  weights = jnp.array([0.0, 0.3, 0.6, 1.0])
  out = editing.slerp(a, b, weights)
  for i in range(4):
    np.testing.assert_allclose(
        out[i], editing.slerp(a[i:i + 1], b[i:i + 1], weights[i:i + 1])[0],
        rtol=1e-5, atol=1e-4,
    )


def test_result_scales_with_its_inputs_and_is_symmetric():
  a, b = pair()
  w = jnp.full(4, 0.3)
  out = editing.slerp(a, b, w)
  np.testing.assert_allclose(
      editing.slerp(a / 80, b / 80, w), out / 80, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
      editing.slerp(b, a, 1 - w), out, rtol=1e-4, atol=1e-4
  )


def test_parallel_latents_are_interpolated_linearly():
  a, _ = pair()
  w = jnp.full(4, 0.25)
  for factor in (1.0, 3.0, 1.0001):
    out = editing.slerp(a, factor * a, w)
    np.testing.assert_allclose(
        out, (0.75 + 0.25 * factor) * a, rtol=1e-5, atol=1e-4
    )
