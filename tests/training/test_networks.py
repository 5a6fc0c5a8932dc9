"""Several networks: own losses, own turns, own counts."""

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

B = 4


def batch():
  return {
      "image": np.ones((B, 1, 1, 1), np.float32),
      "index": np.arange(B, dtype=np.int32),
  }


def begin(method, microbatches=1):
  """(state, jitted step) of a method under SGD."""
  optimizers = {name: optax.sgd(0.1) for name in method.networks}
  images = batch()["image"]
  state = train_state.create(method, optimizers, (0.9,), 0, images, None)
  options = train_step.StepOptions(ema_rates=(0.9,), microbatches=microbatches)
  step = train_step.make_step(method, optimizers, options)
  return state, jax.jit(step, static_argnames="phase")


@dataclasses.dataclass(frozen=True)
class Duel:
  """Two networks whose losses read each other; they take turns."""

  sampled_network = "generator"
  averages = {"old": base.Average("critic", "rate")}

  @property
  def networks(self):
    return {
        "generator": toys.scale_network(2.0), "critic": toys.scale_network(3.0)
    }

  @property
  def losses(self):
    return {"generator": self.generate, "critic": self.judge}

  def generate(self, params, ctx):
    # Its own copy among the networks is stopped as well.
    product = params["w"] * ctx.networks["critic"]["w"]
    own = ctx.networks["generator"]["w"] + ctx.averages["old"]["w"]
    return product * jnp.ones(len(ctx.images)) + own, {}

  def judge(self, params, ctx):
    other = ctx.networks["generator"]["w"]
    loss = jnp.square(params["w"]) * other * jnp.ones(len(ctx.images))
    return loss, {"other": jnp.full(len(ctx.images), other)}

  def phase(self, step):
    return ("generator", "critic") if step % 3 == 0 else ("critic",)

  def phases(self):
    return (("generator", "critic"), ("critic",))

  def curriculum(self, step):
    return {"rate": jnp.float32(0.5)}


def test_players_learn_from_their_own_losses_in_their_own_turns():
  method = Duel()
  state, step = begin(method)
  g, c, old = 2.0, 3.0, 3.0
  for k in range(7):
    phase = method.phase(k)
    state, metrics = step(state, batch(), method.curriculum(k), phase)
    before_g, before_c = g, c
    if "generator" in phase:  # Both gradients are at the old parameters.
      g = before_g - 0.1 * before_c
    c = before_c - 0.1 * 2 * before_c * before_g
    old = 0.5 * old + 0.5 * c
    np.testing.assert_allclose(
        state.networks["generator"].params["w"], g, rtol=1e-5
    )
    np.testing.assert_allclose(
        state.networks["critic"].params["w"], c, rtol=1e-4
    )
    np.testing.assert_allclose(state.averages["old"]["w"], old, rtol=1e-4)
    assert metrics["critic/other"] == pytest.approx(before_g, rel=1e-5)
    assert ("generator/loss" in metrics) == ("generator" in phase)
  assert state.networks["generator"].num_updates == 3
  assert state.networks["critic"].num_updates == 7
  assert step._cache_size() == len(method.phases()) == 2


@pytest.mark.parametrize(
    "name,expected",
    [
        ("generator", {"generator": 3.0, "critic": 0.0}),
        ("critic", {"generator": 0.0, "critic": 12.0}),
    ],
)
def test_a_loss_reaches_its_own_network_alone(name, expected):
  method = Duel()
  state, _ = begin(method)

  def mean(params):
    networks = {
        n: dataclasses.replace(p, params={"w": params[n]})
        for n, p in state.networks.items()
    }
    changed = dataclasses.replace(state, networks=networks)
    value, _ = train_step._loss(
      {"w": params[name]},
      None,
      name,
      method,
      train_step.StepOptions(),
      changed,
      batch(),
      {},
    )
    return value

  table = jax.grad(mean)({"generator": 2.0, "critic": 3.0})
  assert table == pytest.approx(expected)


def test_one_bad_network_stops_both():
  class Bad(Duel):
    def judge(self, params, ctx):
      loss, metrics = super().judge(params, ctx)
      return loss + ctx.images[:, 0, 0, 0], metrics

  method = Bad()
  state, step = begin(method)
  spoilt = batch()
  spoilt["image"][2] = np.nan
  new, _ = step(state, spoilt, method.curriculum(0), method.phase(0))
  toys.assert_equal(new.networks, state.networks)
  toys.assert_equal(new.averages, state.averages)
  assert new.skipped == 1


def test_averages_of_the_sampled_network_move_in_its_own_turns():
  method = Duel()
  state, step = begin(method)
  moved = []
  for k in range(4):
    new, _ = step(state, batch(), method.curriculum(k), method.phase(k))
    moved.append(
      float(new.averages["ema_0.9"]["w"])
      != float(state.averages["ema_0.9"]["w"])
    )
    state = new
  assert moved == [True, False, False, True]


@dataclasses.dataclass(frozen=True)
class Balanced(base.SingleNetworkMethod):
  """|a|^2 of the images and c times |b|^2 of noise, of which b is weighed."""

  factor: float = 1.0
  averages = {}

  @property
  def networks(self):
    def loss_weights(norms):
      return {"a": jnp.ones(()), "b": norms["a"] / norms["b"]}

    network = toys.scale_network(2.0)
    weight = base.AdaptiveWeight(("a", "b"), lambda g: g["w"], loss_weights)
    return {"student": dataclasses.replace(network, adaptive_weight=weight)}

  def loss(self, params, ctx):
    x = ctx.images[:, 0, 0, 0]
    shared = jax.random.uniform(ctx.shared_key("shared"))
    own = jax.vmap(jax.random.uniform)(ctx.keys("own"))
    terms = {
      "a": (params["w"] * x) ** 2,
      "b": self.factor * (params["w"] * own) ** 2,
    }
    return terms, {
      "shared": jnp.full(len(x), shared),
      "own": own,
      "teacher": jnp.full(len(x), ctx.frozen["teacher"]["w"]),
    }

  def curriculum(self, step):
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_terms_are_weighed_by_gradients_of_the_global_batch(
  factor, microbatches
):
  method = Balanced(factor)
  state, step = begin(method, microbatches)
  state = state.replace(frozen={"teacher": {"w": jnp.float32(0.25)}})
  data = batch() | {
    "image": np.arange(1, B + 1, dtype=np.float32).reshape(B, 1, 1, 1)
  }
  new, metrics = step(state, data, {}, ("student",))
  gradient = 2 * 2.0 * np.mean(np.arange(1, B + 1) ** 2.0)
  # Weighed, the second term pulls as the first one, whatever its factor.
  np.testing.assert_allclose(
    new.networks["student"].params["w"], 2.0 - 0.1 * 2 * gradient, rtol=1e-5
  )
  for name in ("shared", "own"):
    np.testing.assert_allclose(metrics[name], _drawn(method)[name], rtol=1e-6)
  np.testing.assert_allclose(
    metrics["weight_b"] * metrics["loss_b"] + metrics["loss_a"],
    metrics["loss"],
    rtol=1e-6,
  )
  assert metrics["teacher"] == 0.25
  toys.assert_equal(new.frozen, state.frozen)
  assert not new.saved().frozen


def _drawn(method):
  """Means of the draws of the first step, in one batch."""
  state, step = begin(method)
  state = state.replace(frozen={"teacher": {"w": jnp.float32(0.25)}})
  return step(state, batch(), {}, ("student",))[1]
