"""One device or four, jit or pmap: the same draws and the same training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.diffusion import process
from bcm_jax.training import parallel
from bcm_jax.training import rng
from bcm_jax.training import state as states
from bcm_jax.training import step as steps
from tests import toys

B = 16
STEPS = 3
TOPOLOGIES = ("jit-1", "jit-2", "jit-4", "pmap-4")


@pytest.fixture(autouse=True, scope="module")
def quickly():
  with toys.quick_compilation():
    yield


def method():
  return toys.bidirectional_toy(
      toys.MLP(width=8, depth=1, dropout=0.3, num_classes=3)
  )


def batch(step=0):
  return {
      "image": toys.images(B, seed=step),
      "label": np.arange(B, dtype=np.int32) % 3,
      "index": np.arange(B, dtype=np.int32),
  }


def runner(topology):
  kind, n = topology.split("-")
  devices = jax.devices()[: int(n)]
  assert len(devices) == int(n)
  if kind == "pmap":
    return parallel.Pmap(tuple(devices))
  return parallel.Jit(parallel.make_mesh(devices))


@functools.cache
def compiled(topology, microbatches=1):
  devices = runner(topology)
  options = steps.StepOptions(
      ema_rates=(0.9,), microbatches=microbatches,
      axis_name=devices.axis_name,
  )
  step = steps.make_step(method(), optimizers(), options)
  return devices, devices.compile(step)


def optimizers():
  return {"student": optax.radam(1e-2)}


@functools.cache
def first_state():
  """The state before the first step, on the host."""
  one = batch()
  state = jax.jit(
      lambda: states.create(
          method(), optimizers(), (0.9,), 0, one["image"], one["label"]
      )
  )()
  return jax.tree.map(np.asarray, state)


def train(topology, microbatches=1):
  """(state, metrics) on the host after a few steps."""
  devices, step = compiled(topology, microbatches)
  state = devices.place(first_state())
  for k in range(STEPS):
    state, metrics = step(
        state, devices.batch(batch(k)), method().curriculum(10 * k),
        ("student",),
    )
  return jax.tree.map(np.asarray, devices.fetch((state, metrics)))


@functools.cache
def reference():
  return train("jit-1")


def draw(index):
  """All that is random in a step: times, ends, noise, dropout masks."""
  m = method()
  ctx = toys.context(
      jnp.zeros((len(index), 2, 2, 1)), m.curriculum(10), index=index, step=4
  )
  times = m.sample_times(ctx)
  z = process.normal_like(ctx.keys("noise"), ctx.images)
  keys = jax.random.key_data(
      rng.example_keys(0, "dropout", jnp.int32(4), index)
  )
  return times.t, times.r, m.sample_end(ctx, times.index), z, keys


@functools.cache
def drawn(topology):
  devices = runner(topology)
  index = devices.batch({"index": batch()["index"]})["index"]
  if "pmap" in topology:
    out = jax.pmap(draw, devices=devices.local_devices)(index)
    return [np.asarray(x).reshape(B, *x.shape[2:]) for x in out]
  return [np.asarray(x) for x in jax.jit(draw)(index)]


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_draws_are_the_same_bit_for_bit(topology):
  for a, b in zip(drawn(topology), drawn("jit-1"), strict=True):
    assert len(np.unique(a, axis=0)) > 1
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_training_is_the_same(topology):
  state, metrics = train(topology)
  expected, expected_metrics = reference()
  assert state.step == STEPS and np.isfinite(metrics["loss"])
  toys.assert_close(state, expected, rtol=1e-5)
  toys.assert_close(metrics, expected_metrics, rtol=1e-4)
  moved = expected.players["student"].params["out"]["kernel"]
  start = first_state().players["student"].params["out"]["kernel"]
  assert np.abs(moved - start).max() > 1e-3


def test_microbatches_on_several_devices_are_the_same():
  state, _ = train("jit-2", microbatches=4)
  toys.assert_close(state, reference()[0], rtol=1e-5)


@pytest.mark.parametrize("topology", ["jit-4", "pmap-4"])
def test_a_second_run_is_identical(topology):
  toys.assert_equal(train(topology), train(topology))


@pytest.mark.parametrize("topology", ["jit-4", "pmap-4"])
def test_devices_agree_on_a_bad_step(topology):
  # One example of one device's slice is spoilt; every copy must skip.
  devices, step = compiled(topology)
  spoilt = batch()
  spoilt["image"] = spoilt["image"].copy()
  spoilt["image"][-1] = np.nan
  state, metrics = step(
      devices.place(first_state()), devices.batch(spoilt),
      method().curriculum(0), ("student",),
  )
  for leaf in jax.tree.leaves(metrics["skipped"]):
    assert np.all(np.asarray(leaf) == 1)
  copies = jax.tree.map(
      lambda x: [np.asarray(s.data) for s in x.addressable_shards],
      state.players,
  )
  start = first_state().players
  for path, leaf in jax.tree_util.tree_leaves_with_path(start):
    found = functools.reduce(_child, path, copies)
    assert len(found) == 4
    for copy in found:
      np.testing.assert_array_equal(copy.reshape(leaf.shape), leaf)


def _child(tree, key):
  name = getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
  return getattr(tree, name) if isinstance(name, str) and hasattr(
      tree, name
  ) else tree[name]


def test_the_state_is_replicated_and_the_batch_is_cut():
  devices = runner("jit-4")
  state = devices.place(first_state())
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
  cut = devices.batch(batch())
  for name, value in cut.items():
    assert value.shape == batch()[name].shape
    assert {s.data.shape[0] for s in value.addressable_shards} == {B // 4}
    np.testing.assert_array_equal(value, batch()[name])
  pieces = runner("pmap-4").batch(batch())
  assert pieces["image"].shape == (4, B // 4, 2, 2, 1)
  np.testing.assert_array_equal(pieces["index"].reshape(-1), np.arange(B))


