"""Batches are a pure function of (seed, step)."""

import threading
import time

import numpy as np
import pytest

from bcm_jax.data import image_source
from bcm_jax.data import pipeline
from bcm_jax.errors import UserError

N = 23  # Prime, so that no batch size divides an epoch.


@pytest.fixture
def source():
  images = np.random.default_rng(0).integers(0, 256, (N, 4, 6, 3), np.uint8)
  return image_source.ArraySource(images, np.arange(N) % 5, 5, name="toy")


def _ids(seed, steps, batch_size):
  return np.concatenate(
      [pipeline.batch_indices(seed, k, batch_size, N) for k in steps]
  )


def _same(a, b):
  return a.keys() == b.keys() and all(
      a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
  )


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23])
def test_every_epoch_visits_every_example_once(batch_size):
  ids = _ids(seed=1, steps=range(N), batch_size=batch_size)
  epochs = ids.reshape(batch_size, N)  # N steps are batch_size epochs.
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(N))


def test_the_batch_size_only_cuts_the_same_row_of_examples():
  np.testing.assert_array_equal(_ids(1, range(20), 5), _ids(1, range(10), 10))


def test_a_batch_over_the_border_joins_two_epochs():
  batch = pipeline.batch_indices(3, 2, 10, N)  # Items 20..29.
  first, second = (pipeline.epoch_permutation(3, e, N) for e in (0, 1))
  np.testing.assert_array_equal(batch, np.concatenate([first[20:], second[:7]]))


def test_order_differs_between_epochs_and_seeds_but_not_between_calls():
  orders = [
      tuple(pipeline.epoch_permutation(seed, epoch, N))
      for seed in (0, 1, 2**32)
      for epoch in (0, 1, 2)
  ]
  assert len(set(orders)) == 9
  pipeline.epoch_permutation.cache_clear()
  assert tuple(pipeline.epoch_permutation(0, 0, N)) == orders[0]


def test_order_is_pinned():
  # A run must resume with the same batches under a later NumPy.
  order = pipeline.epoch_permutation(0, 0, 8)
  assert order.tolist() == [3, 5, 0, 6, 7, 4, 2, 1]
  mask = pipeline.flip_mask(0, 0, 8)
  assert mask.astype(int).tolist() == [1, 0, 0, 1, 1, 1, 1, 1]


def test_the_cached_order_cannot_be_changed_through_a_batch(source):
  before = pipeline.batch_indices(0, 0, 4, N)
  pipeline.batch_indices(0, 0, 4, N)[:] = 0
  np.testing.assert_array_equal(pipeline.batch_indices(0, 0, 4, N), before)
  with pytest.raises(ValueError):
    pipeline.epoch_permutation(0, 0, N)[0] = 1


def test_a_batch_holds_what_its_ids_say(source):
  batch = pipeline.get_batch(source, 0, 6, 8)
  raw = source.fetch(batch["example"])
  np.testing.assert_array_equal(
      batch["example"], pipeline.batch_indices(0, 6, 8, N)
  )
  np.testing.assert_array_equal(batch["label"], raw["label"])
  np.testing.assert_array_equal(batch["image"], raw["image"])
  assert batch["index"].tolist() == list(range(8))
  assert batch["image"].dtype == np.uint8
  assert {batch[k].dtype for k in ("label", "index", "example")} == {
      np.dtype(np.int32)
  }


def test_a_restart_gives_the_same_batches(source):
  run = pipeline.Batches(source, 5, 7, flip=True)
  whole = list(pipeline.prefetch(run, 0, 9))
  pipeline.epoch_permutation.cache_clear()
  again = pipeline.Batches(source, 5, 7, flip=True)
  resumed = list(pipeline.prefetch(again, 4, 9))
  assert len(whole) == 9 and len(resumed) == 5
  assert all(_same(a, b) for a, b in zip(whole[4:], resumed, strict=True))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_hosts_are_disjoint_and_exhaustive(source, count):
  whole = pipeline.get_batch(source, 2, 3, 8, flip=True)
  parts = [
      pipeline.get_batch(
          source, 2, 3, 8, flip=True, process_index=i, process_count=count
      )
      for i in range(count)
  ]
  joined = {k: np.concatenate([p[k] for p in parts]) for k in whole}
  assert _same(joined, whole)
  for i, part in enumerate(parts):
    assert _same(pipeline.host_slice(whole, i, count), part)
  positions = [set(p["index"].tolist()) for p in parts]
  assert sum(map(len, positions)) == len(set.union(*positions)) == 8


def test_a_host_reads_only_its_own_examples(source):
  asked = []
  fetch = source.fetch
  source.fetch = lambda ids: asked.append(len(ids)) or fetch(ids)
  pipeline.get_batch(source, 0, 0, 8, process_index=1, process_count=4)
  assert asked == [2]


def test_hosts_must_divide_the_batch(source):
  with pytest.raises(UserError, match="batch_size.*8.*3"):
    pipeline.get_batch(source, 0, 0, 8, process_index=0, process_count=3)


@pytest.mark.parametrize("batch_size", [0, N + 1])
def test_batch_size_is_checked_before_the_first_batch(source, batch_size):
  with pytest.raises(UserError, match=f"batch_size.*{batch_size}.*{N}"):
    pipeline.Batches(source, 0, batch_size)
  with pytest.raises(UserError, match=f"batch_size.*{batch_size}.*{N}"):
    pipeline.get_batch(source, 0, 0, batch_size)


def test_negative_seed_is_a_user_error(source):
  with pytest.raises(UserError, match="seed.*-1"):
    pipeline.get_batch(source, -1, 0, 4)


def test_labels_of_any_source_are_checked(source):
  source.num_classes = 3
  with pytest.raises(UserError, match="toy.* 0 to 2"):
    pipeline.get_batch(source, 0, 0, 20)


def _flips(plain, flipped):
  """Returns which images are mirrored; fails if any is neither."""
  mirrored = []
  for a, b in zip(plain["image"], flipped["image"], strict=True):
    same, mirror = np.array_equal(a, b), np.array_equal(a[:, ::-1], b)
    assert same != mirror
    mirrored.append(mirror)
  return np.array(mirrored)


def test_flips_mirror_left_to_right_and_change_nothing_else(source):
  plain = pipeline.get_batch(source, 0, 1, 16)
  flipped = pipeline.get_batch(source, 0, 1, 16, flip=True)
  np.testing.assert_array_equal(
      _flips(plain, flipped), pipeline.flip_mask(0, 1, 16)
  )
  for key in ("label", "index", "example"):
    np.testing.assert_array_equal(plain[key], flipped[key])


def test_flips_are_keyed_by_seed_step_and_position_only():
  mask = pipeline.flip_mask(0, 1, 64)
  np.testing.assert_array_equal(pipeline.flip_mask(0, 1, 32), mask[:32])
  assert not np.array_equal(pipeline.flip_mask(1, 1, 64), mask)
  assert not np.array_equal(pipeline.flip_mask(0, 2, 64), mask)
  # Position p of all steps together: a fair coin, not one coin a position.
  many = np.stack([pipeline.flip_mask(0, k, 64) for k in range(400)])
  assert np.all(np.abs(many.mean(0) - 0.5) < 5 * 0.5 / 400**0.5)
  assert np.all(np.abs(many.mean(1) - 0.5) < 5 * 0.5 / 64**0.5)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("stop", [0, 3, 7])
def test_an_epoch_over_hosts_and_a_restart_is_the_data_set(
    source, hosts, stop
):
  """Batches of 8 from N examples: lcm(8, N) / 8 steps are whole epochs."""
  steps = np.lcm(8, N) // 8
  seen = []
  for host in range(hosts):
    batches = pipeline.Batches(
        source, 3, 8, process_index=host, process_count=hosts
    )
    before = list(pipeline.prefetch(batches, 0, stop))
    pipeline.epoch_permutation.cache_clear()
    after = list(pipeline.prefetch(batches, stop, steps))
    seen += [b["example"] for b in before + after]
  found, counts = np.unique(np.concatenate(seen), return_counts=True)
  assert found.tolist() == list(range(N))
  assert set(counts) == {steps * 8 // N}


def test_flips_leave_the_source_untouched(source):
  before = source.fetch(np.arange(N))["image"].copy()
  pipeline.get_batch(source, 0, 0, N, flip=True)
  np.testing.assert_array_equal(source.fetch(np.arange(N))["image"], before)


def _prefetch_threads():
  return [t for t in threading.enumerate() if t.name.startswith("grain-pre")]


def _no_thread_is_left():
  """Closing does not wait for the thread, which ends at once."""
  for thread in _prefetch_threads():
    thread.join(5)
  return not _prefetch_threads()


def test_prefetch_keeps_the_order_and_covers_the_range():
  def slow_first(step):
    time.sleep(0.02 if step == 3 else 0)
    return step

  for depth in (1, 2, 5, 50):
    got = list(pipeline.prefetch(slow_first, 3, 12, depth=depth))
    assert got == list(range(3, 12))
  assert list(pipeline.prefetch(slow_first, 3, 3)) == []
  assert _no_thread_is_left()


def test_prefetch_works_ahead_by_depth_and_no_further():
  made, third = [], threading.Event()

  def make(step):
    made.append(step)
    if step == 2:
      third.set()
    return step

  batches = pipeline.prefetch(make, 0, 100, depth=2)
  assert next(batches) == 0
  assert third.wait(5)  # Made while nobody asked for it.
  time.sleep(0.05)
  assert made == [0, 1, 2]
  batches.close()


def test_prefetch_raises_where_the_batch_would_have_been():
  def fails_at_two(step):
    if step == 2:
      raise UserError("no batch two")
    return step

  batches = pipeline.prefetch(fails_at_two, 0, 9, depth=4)
  assert [next(batches), next(batches)] == [0, 1]
  with pytest.raises(UserError, match="no batch two"):
    next(batches)
  assert _no_thread_is_left()


def test_prefetch_stops_its_threads_when_closed():
  batches = pipeline.prefetch(lambda step: step, 0, 10**9)
  assert _no_thread_is_left()
  next(batches)
  assert 1 <= len(_prefetch_threads()) <= 2
  batches.close()
  assert _no_thread_is_left()


def test_prefetch_depth_is_checked():
  with pytest.raises(UserError, match="depth.*0"):
    pipeline.prefetch(lambda step: step, 0, 1, depth=0)


def test_prefetch_keeps_the_order_of_batches_of_uneven_cost():
  """Even batches take longest: an odd one is ready before its turn."""
  def uneven(step):
    time.sleep(0.005 * (step % 2 == 0))
    return step

  for depth in (2, 3, 8):
    assert list(pipeline.prefetch(uneven, 0, 40, depth)) == list(range(40))
