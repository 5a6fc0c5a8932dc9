"""One device or eight, jit, fsdp or pmap: the same draws, the same training."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from bcm_jax.checkpoint import checkpoint
from bcm_jax.training import sharding
from tests import quick
from tests import toys
from tests.training import topologies
from tests.training.topologies import B
from tests.training.topologies import batch
from tests.training.topologies import compiled
from tests.training.topologies import drawn
from tests.training.topologies import first_state
from tests.training.topologies import inputs
from tests.training.topologies import runner
from tests.training.topologies import STEPS
from tests.training.topologies import train

TOPOLOGIES = ("jit-2", "jit-4", "pmap-4", "fsdp-2x2", "fsdp-1x4", "pattern-2x2")
CUT = ("fsdp-2x2", "fsdp-1x4", "pattern-2x2")


def slow(*names):
  """Returns parameters for pytest that are slow."""
  return [pytest.param(name, marks=pytest.mark.slow) for name in names]



@pytest.fixture(autouse=True, scope="module")
def small_tensors():
  # The toy's tensors are smaller than what is worth cutting.
  before, sharding._MIN_SHARD_SIZE = sharding._MIN_SHARD_SIZE, 16
  yield
  sharding._MIN_SHARD_SIZE = before


@functools.cache
def reference():
  return train("jit-1")


@pytest.mark.parametrize("topology", [
    "jit-4", "pmap-4", "fsdp-2x2", *slow("jit-2", "fsdp-1x4", "pattern-2x2")
])
def test_draws_are_the_same_bit_for_bit(topology):
  for a, b in zip(drawn(topology), drawn("jit-1"), strict=True):
    assert len(np.unique(a, axis=0)) > 1
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_training_is_the_same(topology):
  state, metrics = train(topology)
  expected, expected_metrics = reference()
  assert state.step == STEPS and np.isfinite(metrics["loss"]).all()
  toys.assert_close(state, expected, rtol=1e-5)
  toys.assert_close(metrics, expected_metrics, rtol=1e-4)
  moved = expected.networks["student"].params["out"]["kernel"]
  start = first_state().networks["student"].params["out"]["kernel"]
  assert np.abs(moved - start).max() > 1e-3


@pytest.mark.slow
def test_eight_devices_are_the_same(tmp_path):
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
      [sys.executable, "-m", "tests.training.topologies", tmp_path / "8.npz",
       "jit-8"],
      env={**os.environ, "PYTHONPATH": str(root),
           "XLA_FLAGS": quick.flags(8)},
      cwd=root, capture_output=True, text=True, timeout=300, check=False,
  )
  assert done.returncode == 0, done.stderr
  with np.load(tmp_path / "8.npz") as eight:
    found = [eight[f"arr_{i}"] for i in range(len(eight.files))]
  expected = topologies.flat("jit-1")
  exact = len(drawn("jit-1"))
  for i, (a, b) in enumerate(zip(found, expected, strict=True)):
    if i < exact:
      np.testing.assert_array_equal(a, b)
    else:
      toys.assert_close(a, b, rtol=1e-4 if b.shape == (STEPS,) else 1e-5)


@pytest.mark.slow
def test_terms_are_weighed_over_all_devices():
  params, weights = topologies.weighed("pmap-4")
  expected, expected_weights = topologies.weighed("jit-1")
  toys.assert_close(params, expected, rtol=1e-5)
  np.testing.assert_allclose(weights, expected_weights, rtol=1e-4)
  # ctm, dsm and gan, in two turns of the student.
  ctm, dsm, gan = weights.reshape(2, 3).T
  assert list(ctm) == [1, 1]
  assert 1 < dsm.min() < dsm.max() < 1e4  # Neither is at its bound.
  assert 0.01 < gan[0] < 10


def test_pmap_is_jit_on_the_same_devices():
  toys.assert_close(train("pmap-4"), train("jit-4"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["pmap-4", "fsdp-2x2"])
def test_steps_of_one_call_are_the_same(topology):
  state, metrics = train(topology, at_once=True)
  expected, expected_metrics = reference()
  toys.assert_close(state, expected, rtol=1e-5)
  assert metrics["loss"].shape == (STEPS,)
  toys.assert_close(metrics, expected_metrics, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp-2x2", "pmap-4"])
def test_microbatches_on_several_devices_are_the_same(topology):
  state, _ = train(topology, microbatches=4)
  toys.assert_close(state, reference()[0], rtol=1e-5)


@pytest.mark.parametrize("topology", ["jit-4", *slow("pmap-4", "fsdp-2x2")])
def test_a_second_run_is_identical(topology):
  toys.assert_equal(train(topology), train(topology))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["jit-4", "pmap-4"])
def test_devices_agree_on_a_bad_step(topology):
  # One example of one device's slice is spoilt; every copy must skip.
  devices, step = compiled(topology)
  spoilt = batch()
  spoilt["image"] = spoilt["image"].copy()
  spoilt["image"][-1] = np.nan
  state, metrics = step(
      devices.place(first_state()), devices.batch(spoilt),
      topologies.method().curriculum(0), ("student",),
  )
  for leaf in jax.tree.leaves(metrics["skipped"]):
    assert np.all(np.asarray(leaf) == 1)
  copies = jax.tree.map(
      lambda x: [np.asarray(s.data) for s in x.addressable_shards],
      state.networks,
  )
  start = first_state().networks
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


# Where things lie.


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


@pytest.mark.parametrize("topology", ["jit-4", "fsdp-2x2"])
def test_several_batches_are_stacked_and_cut(topology):
  cut = runner(topology).batch(batch(0), batch(1))
  for name, value in cut.items():
    assert {s.data.shape[:2] for s in value.addressable_shards} == {(2, B // 4)}
    both = np.stack([batch(0)[name], batch(1)[name]])
    np.testing.assert_array_equal(value, both)
  pieces = runner("pmap-4").batch(batch(0), batch(1))
  assert pieces["image"].shape == (4, 2, B // 4, 2, 2, 1)
  np.testing.assert_array_equal(pieces["image"][1, 1], batch(1)["image"][4:8])


def shards(tree):
  """Path -> shape of the parts that the devices hold."""
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): {
          s.data.shape for s in leaf.addressable_shards
      } for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.slow
@pytest.mark.parametrize("topology, out, hidden, optimizer", [
    # [8, 4] and [9, 8]: along the longest axis that divides evenly.
    ("fsdp-2x2", (4, 4), (9, 4), (4, 4)),
    ("fsdp-1x4", (2, 4), (9, 2), (2, 4)),
    ("pattern-2x2", (4, 4), (9, 4), (4, 4)),
])
def test_the_state_is_really_cut(topology, out, hidden, optimizer):
  devices, step = compiled(topology)
  kernel = "networks/student/params/out/kernel"
  state = devices.create(topologies.create)
  for where in (state, devices.place(first_state()),
                step(devices.place(first_state()), *inputs(devices, 0),
                     ("student",))[0]):
    found = shards(where)
    assert found[kernel] == {out}
    assert found["networks/student/params/hidden_0/kernel"] == {hidden}
    assert found["averages/ema_0.9/out/kernel"] == {out}
    moments = [v for k, v in found.items()
               if k.endswith("out/kernel") and "opt_state" in k]
    assert len(moments) == 2 and all(m == {optimizer} for m in moments)
    assert found["step"] == {()}
  toys.assert_equal(
      jax.tree.map(np.asarray, state), first_state()
  )


# What is not done twice.


@pytest.mark.parametrize("topology", ["jit-4", *slow(*CUT)])
def test_one_executable_no_transfer_and_no_copy(topology):
  devices, step = compiled(topology)
  step.clear_cache()
  state = devices.create(topologies.create)
  for k in range(STEPS):
    ready = inputs(devices, k)
    before = jax.tree.leaves(state)
    with jax.transfer_guard("disallow"):
      state, _ = step(state, *ready, ("student",))
    assert all(x.is_deleted() for x in before)  # Given away.
    assert step._cache_size() == 1
  step(devices.place(first_state()), *inputs(devices, 0), ("student",))
  assert step._cache_size() == 1


@pytest.mark.parametrize("topology", ["fsdp-2x2", *slow("jit-4")])
def test_one_executable_for_several_steps(topology):
  devices, step = compiled(topology, several=True)
  step.clear_cache()
  state = devices.create(topologies.create)
  for _ in range(2):
    ready = inputs(devices, 0, 1, 2)
    with jax.transfer_guard("disallow"):
      state, _ = step(state, *ready, ("student",))
  assert step._cache_size() == 1


# From one topology to another.


def test_a_checkpoint_is_the_same_on_every_topology(tmp_path):
  """4 -> 2 -> 1 devices, cut and uncut, pmap, and back: the same bits."""
  way = ("jit-4", "jit-2", "jit-1", "fsdp-2x2", "pmap-4", "pattern-2x2",
         "fsdp-1x4", "jit-4")
  _, step = compiled("fsdp-2x2")
  devices = runner("fsdp-2x2")
  state, _ = step(
      devices.place(first_state()), *inputs(devices, 0), ("student",)
  )
  trained = jax.tree.map(np.asarray, state)
  template = jax.eval_shape(topologies.create)
  records = []
  with checkpoint.Checkpoints(str(tmp_path / "c"), keep=None) as saved:
    for number, topology in enumerate(way):
      saved.save(number, devices.fetch(state), {})
      saved.wait()
      records.append(saved.read_raw(number)[1])
      devices = runner(topology)
      _, restored, _ = saved.restore(devices.abstract(template))
      state = devices.place(restored)
      toys.assert_equal(
          jax.tree.map(np.asarray, devices.fetch(state)), trained
      )
      if "pmap" not in topology:
        wanted = jax.tree.leaves(devices.shardings(template))
        assert [x.sharding for x in jax.tree.leaves(state)] == wanted
  for record in records[1:]:
    toys.assert_equal(record, records[0])
