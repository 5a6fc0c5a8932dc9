"""Several players: own losses, own turns, own counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.methods import base
from bcm_jax.training import state as states
from bcm_jax.training import step as steps
from tests import toys

B = 4


@pytest.fixture(autouse=True, scope="module")
def quickly():
  with toys.quick_compilation():
    yield


def batch():
  return {
      "image": np.ones((B, 1, 1, 1), np.float32),
      "index": np.arange(B, dtype=np.int32),
  }


def begin(method):
  """(state, jitted step) of a method under SGD."""
  optimizers = {name: optax.sgd(0.1) for name in method.players}
  images = batch()["image"]
  state = states.create(method, optimizers, (0.9,), 0, images, None)
  options = steps.StepOptions(ema_rates=(0.9,))
  step = steps.make_step(method, optimizers, options)
  return state, jax.jit(step, static_argnames="phase")


@dataclasses.dataclass(frozen=True)
class Duel:
  """Two players whose losses read each other; they take turns."""

  sampled = "generator"
  averages = {"old": base.Average("critic", "rate")}

  @property
  def players(self):
    return {
        "generator": toys.scale_player(2.0), "critic": toys.scale_player(3.0)
    }

  @property
  def losses(self):
    return {"generator": self.generate, "critic": self.judge}

  def generate(self, params, ctx):
    # Its own copy among the players is stopped as well.
    product = params["w"] * ctx.players["critic"]["w"]
    own = ctx.players["generator"]["w"] + ctx.averages["old"]["w"]
    return product * jnp.ones(len(ctx.images)) + own, {}

  def judge(self, params, ctx):
    other = ctx.players["generator"]["w"]
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
        state.players["generator"].params["w"], g, rtol=1e-5
    )
    np.testing.assert_allclose(
        state.players["critic"].params["w"], c, rtol=1e-4
    )
    np.testing.assert_allclose(state.averages["old"]["w"], old, rtol=1e-4)
    assert metrics["critic/other"] == pytest.approx(before_g, rel=1e-5)
    assert ("generator/loss" in metrics) == ("generator" in phase)
  assert state.players["generator"].updates == 3
  assert state.players["critic"].updates == 7
  assert step._cache_size() == len(method.phases()) == 2


@pytest.mark.parametrize(
    "name,expected",
    [
        ("generator", {"generator": 3.0, "critic": 0.0}),
        ("critic", {"generator": 0.0, "critic": 12.0}),
    ],
)
def test_a_loss_reaches_its_own_player_alone(name, expected):
  method = Duel()
  state, _ = begin(method)

  def mean(params):
    players = {
        n: dataclasses.replace(p, params={"w": params[n]})
        for n, p in state.players.items()
    }
    changed = dataclasses.replace(state, players=players)
    value, _ = steps._loss(
        {"w": params[name]}, name, method, steps.StepOptions(), changed,
        batch(), {},
    )
    return value

  table = jax.grad(mean)({"generator": 2.0, "critic": 3.0})
  assert table == pytest.approx(expected)


def test_one_bad_player_stops_both():
  class Bad(Duel):
    def judge(self, params, ctx):
      loss, metrics = super().judge(params, ctx)
      return loss + ctx.images[:, 0, 0, 0], metrics

  method = Bad()
  state, step = begin(method)
  spoilt = batch()
  spoilt["image"][2] = np.nan
  new, _ = step(state, spoilt, method.curriculum(0), method.phase(0))
  toys.assert_equal(new.players, state.players)
  toys.assert_equal(new.averages, state.averages)
  assert new.skipped == 1
