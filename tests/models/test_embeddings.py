"""Embeddings of noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import embeddings
from tests import golden


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 33])
def test_embedding_is_the_reference_one(dim):
  g, name = golden.load("sched_scalings"), f"temb{dim}"
  c_noise = 250 * np.log(g["in/sigma"].astype(np.float64))
  ours = embeddings.sinusoidal_embedding(
      jnp.asarray(c_noise, jnp.float32), dim
  )
  assert ours.dtype == jnp.float32
  golden.close(ours, g, name)
  with jax.enable_x64(True):
    ours = embeddings.sinusoidal_embedding(jnp.asarray(c_noise), dim)
    golden.close(ours, g, name, rel=1e-11)


def test_bfloat16_levels_are_embedded_in_float32():
  c_noise = jnp.asarray([-1552.0, 3.0], jnp.bfloat16)
  ours = embeddings.sinusoidal_embedding(c_noise, 8)
  assert ours.dtype == jnp.float32
  np.testing.assert_array_equal(
      ours, embeddings.sinusoidal_embedding(c_noise.astype(jnp.float32), 8)
  )
