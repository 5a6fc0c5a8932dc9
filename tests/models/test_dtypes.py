"""Square roots, norms and normalized kernels at exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import distances
from bcm_jax.models import dtypes
from bcm_jax.models import layers
from bcm_jax.models import mp_layers

_FUNCTIONS = {
    "safe_sqrt": dtypes.safe_sqrt, "unit_rms": layers.unit_rms,
    "unit_kernel": mp_layers.unit_kernel, "unit": distances.unit,
    "l2_norm": lambda x: distances.pseudo_huber(x, 0 * x, 0.0),
    "l1": lambda x: distances.l1(x, 0 * x),
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_derivatives_at_zero_are_finite(name):
  f, zero = _FUNCTIONS[name], jnp.zeros((4, 4))
  for tangent in (zero, jnp.ones((4, 4))):
    value, derivative = jax.jvp(f, (zero,), (tangent,))
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(derivative))
  assert np.all(np.isfinite(jax.grad(lambda x: f(x).sum())(zero)))


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_other_derivatives_are_unchanged(name):
  f, x = _FUNCTIONS[name], jnp.asarray([[0.3, 1.0, 2.0, 0.7]] * 4)
  v = jnp.asarray([[1.0, -0.5, 0.2, 0.1]] * 4)
  with jax.enable_x64(True):
    x, v = np.asarray(x, np.float64), np.asarray(v, np.float64)
    _, derivative = jax.jvp(f, (x,), (v,))
    h = 1e-6
    np.testing.assert_allclose(
        derivative, (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_nan_is_not_hidden(name):
  assert np.isnan(_FUNCTIONS[name](jnp.full((2, 2), jnp.nan))).all()
