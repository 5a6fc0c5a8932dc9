"""Loss scaling: gradients survive float16, overflows are skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.methods import base
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import toys

BATCH = {
    "image": np.ones((4, 1, 1, 1), np.float32),
    "index": np.arange(4, dtype=np.int32),
}


@dataclasses.dataclass(frozen=True)
class Half(base.SingleNetworkMethod):
  """gain w x in float16; its gradient passes through float16, too."""

  averages = {}
  gain: float = 1e-9

  @property
  def networks(self):
    return {"student": toys.scale_network()}

  def curriculum(self, step):
    return {}

  def loss(self, params, ctx):
    half = (params["w"] * ctx.images[:, 0, 0, 0]).astype(jnp.float16)
    return self.gain * half.astype(jnp.float32), {}


def train(method, loss_scaling, count=1):
  optimizer = {"student": optax.sgd(1.0)}
  state = train_state.create(
      method, optimizer, (), 0, BATCH["image"], None, None, loss_scaling
  )
  step = jax.jit(
    train_step.make_step(
      method, optimizer, train_step.StepOptions(ema_rates=())
    ),
    static_argnames="phase",
  )
  for _ in range(count):
    state, metrics = step(state, BATCH, {}, ("student",))
  return state, metrics


def test_small_gradients_survive_with_the_scale_alone():
  # 1e-9 / 4 is below the smallest float16 number, 6e-8.
  plain, metrics = train(Half(), False)
  assert plain.log2_loss_scale is None and "log2_loss_scale" not in metrics
  assert plain.networks["student"].params["w"] == 1.0
  assert metrics["grad_norm"] == 0
  _, metrics = train(Half(), True)
  assert float(metrics["grad_norm"]) == pytest.approx(1e-9, rel=0.01)
  assert float(metrics["loss"]) == pytest.approx(1e-9, rel=1e-3)


def test_an_overflow_halves_the_scale_until_it_fits():
  # 32 / 4 times 2^16, 2^15, 2^14 and 2^13 are beyond the largest, 65504.
  state, metrics = train(Half(gain=32.0), True)
  assert metrics["skipped"] == 1 and state.log2_loss_scale == 15
  np.testing.assert_array_equal(state.networks["student"].params["w"], 1.0)
  state, metrics = train(Half(gain=32.0), True, 6)
  assert metrics["skipped"] == 4 and metrics["skipped_in_row"] == 0
  assert float(state.log2_loss_scale) == pytest.approx(12.002)
  weight = float(state.networks["student"].params["w"])
  assert weight == pytest.approx(-63, rel=1e-3)
