"""BCM that starts from a consistency model: F unchanged, f nearly so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.models import adm
from bcm_jax.training import train_state
from tests import toys

B = 8
IMAGES = toys.images(B)
T = np.float32([80.0, 2.0, 0.5, 0.07, 10.0, 1.0, 0.02, 30.0])
U = np.float32([0.002, 80.0, 2.0, 15.0, 0.3, 0.5, 0.05, 0.07])


@functools.cache
def finetuning():
  """The network by two_time, a CM's parameters, and a BCM's fresh ones."""

  def network(two_time):
    return adm.ADM(
        model_channels=8, out_channels=1, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_head_channels=None, num_heads=1,
        num_groups=2, two_time=two_time,
    )

  cm = toys.consistency_toy(network(False))
  bcm = toys.bidirectional_toy(network(True))
  source, fresh = (
      jax.eval_shape(m.init, jax.random.key(0), IMAGES, None)
      for m in (cm, bcm)
  )
  noise = np.random.default_rng(0)
  source, fresh = jax.tree.map(
      lambda p: np.float32(0.2 * noise.standard_normal(p.shape)),
      (source, fresh),
  )
  return network, source, fresh


@pytest.mark.slow
def test_fine_tuning_starts_with_the_output_unchanged():
  network, source, fresh = finetuning()
  bcm = toys.bidirectional_toy(network(True))
  params = bcm.networks["student"].load_pretrained(source, fresh)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  x = IMAGES + T[:, None, None, None] * toys.images(seed=1) * 2
  end = np.full(B, 0.002, np.float32)
  jump = jax.jit(lambda p, u: bcm.f(p, x, T, u, None))

  def consistency_model(form, u):
    cm = toys.consistency_toy(network(False), preconditioning=form)
    return jax.jit(lambda p: cm.f(p, x, T, u, None))(source)

  # Of the same preconditioning, f is the same at every end: F is the old one.
  for u in (end, U):
    before = consistency_model("bcm", u)
    np.testing.assert_allclose(jump(params, u), before, rtol=1e-5, atol=1e-5)
  # F is not 0, which would hide everything.
  skip = preconditioning.Bidirectional()(T, U).c_skip
  assert np.abs(before - skip[:, None, None, None] * x).max() > 0.1
  # f differs from the CM's own by its c_skip, sigma_min of the data's scale.
  own = consistency_model("cm", end)
  difference = np.sqrt(np.mean(np.square(jump(params, end) - own)))
  assert 0 < difference < 3e-3


def test_a_bidirectional_source_is_taken_as_it_is():
  network, _, fresh = finetuning()
  bcm = toys.bidirectional_toy(network(True))
  assert bcm.load_pretrained(fresh, fresh) is fresh


@pytest.mark.parametrize("change, named", [
    ({"out_2": {"kernel": np.ones(3), "bias": np.ones(1)}}, r"out_2.*\(3,\)"),
    ({"out_9": {"bias": np.ones(1)}}, "out_9/bias"),
])
def test_a_source_that_does_not_fit_is_refused(change, named):
  network, source, _ = finetuning()
  with pytest.raises(ValueError, match=named):
    jax.eval_shape(
        lambda: train_state.create(
            toys.bidirectional_toy(network(True)), {"student": optax.sgd(1)},
            (), 0, jnp.asarray(IMAGES), None, {"student": source | change},
        )
    )
