"""Gradients of microbatches, added up on each device: nothing else changes."""

import functools

import jax
import numpy as np
import optax
import pytest

from bcm_jax import errors
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import toys

B, STEPS = 16, 3


@functools.cache
def trained(devices, parts, local, per_call=1):
  method = toys.bidirectional_toy(toys.MLP(width=8, depth=1, dropout=0.3))
  optimizers = {"student": optax.radam(1e-2)}
  backend = sharding.Jit(
      sharding.make_mesh(jax.devices()[:devices]), local=local
  )
  step = backend.compile(
      train_step.make_step(method, optimizers, train_step.StepOptions(
          ema_rates=(0.9,), microbatches=parts, axis_name=backend.axis_name,
      )), per_call > 1,
  )
  images = toys.images(B)
  state = backend.create(
      lambda: train_state.create(method, optimizers, (0.9,), 0, images, None)
  )
  batch = {"image": images, "index": np.arange(B, dtype=np.int32)}
  for start in range(0, STEPS, per_call):
    state, metrics = step(
        state, backend.batch(*[batch] * per_call),
        backend.replicate(sharding.curricula(method, start, per_call)),
        ("student",),
    )
  return jax.tree.map(np.asarray, (state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_parts_and_devices_change_nothing_but_rounding(local):
  state, metrics = trained(4, 4, local)
  expected, expected_metrics = trained(1, 1, False)
  toys.assert_close(state, expected, rtol=1e-5)
  toys.assert_close(metrics, expected_metrics, rtol=1e-5)


@pytest.mark.slow
def test_several_steps_a_call():
  state, metrics = trained(4, 4, True, per_call=STEPS)
  toys.assert_close(state, trained(4, 4, True)[0], rtol=1e-6)
  np.testing.assert_allclose(
      metrics["loss"][-1], trained(4, 4, True)[1]["loss"], rtol=1e-5
  )


@pytest.mark.parametrize("batch_size,devices,limit,parts", [
    (4096, 256, 0, 1), (4096, 256, 16, 1), (4096, 16, 16, 16),
    (4096, 1, 64, 64), (1000, 8, 64, 5), (12, 2, 4, 2), (7, 1, 2, 7),
])
def test_the_global_batch_holds_on_any_number_of_devices(
    batch_size, devices, limit, parts
):
  assert sharding.microbatches(batch_size, devices, limit) == parts


def test_a_batch_that_cannot_be_cut_says_so():
  with pytest.raises(errors.UserError, match="multiple of 8"):
    sharding.microbatches(100, 8, 0)
