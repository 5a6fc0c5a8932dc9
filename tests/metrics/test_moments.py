"""Means and covariances that come in blocks, from devices and from hosts."""

from concurrent.futures import ThreadPoolExecutor
import fractions
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import moments

DIMENSION = 12


def features(count=211, dtype=np.float64, offset=3.0):
  rng = np.random.default_rng(count)
  mix = rng.normal(size=(DIMENSION, DIMENSION))
  return (offset + rng.normal(size=(count, DIMENSION)) @ mix).astype(dtype)


def in_blocks(rows, *cuts):
  found = moments.empty(rows.shape[1])
  for block in np.split(rows, cuts):
    found = found.update(block)
  return found


def assert_close(a, b, rtol=1e-13):
  assert a.count == b.count
  np.testing.assert_allclose(a.mean, b.mean, rtol=rtol)
  scale = np.abs(b.scatter).max()
  np.testing.assert_allclose(a.scatter, b.scatter, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_are_those_of_numpy(dtype):
  rows = features(dtype=dtype)
  mean, covariance = in_blocks(rows, 10, 11, 100).gaussian()
  assert mean.dtype == covariance.dtype == np.float64
  exact = rows.astype(np.float64)
  np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-13)
  np.testing.assert_allclose(
    covariance, np.cov(exact, rowvar=False), rtol=0, atol=1e-13 * exact.var()
  )
  np.testing.assert_array_equal(covariance, covariance.T)


@pytest.mark.parametrize("cuts", [(), (1,), (100, 100), (5, 50, 199), (210,)])
def test_blocks_and_order_change_nothing(cuts):
  rows = features()
  whole = in_blocks(rows)
  assert_close(in_blocks(rows, *cuts), whole)
  shuffled = np.random.default_rng(0).permutation(rows)
  assert_close(in_blocks(shuffled, *cuts), whole)
  assert_close(moments.from_features(rows, 1 + sum(cuts)), whole)


def test_a_far_mean_costs_no_digits_of_the_covariance():
  # Raw sums of squares would keep about 4 of 16 digits here.
  near, far = features(offset=0.0), 1e6
  rows = near + far
  found = in_blocks(rows, 1, 30, 150).gaussian().covariance
  expected = np.cov(rows - far, rowvar=False)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
  mean = sum(map(fractions.Fraction, rows[:, 0])) / len(rows)
  assert in_blocks(rows, 7).mean[0] == pytest.approx(float(mean), rel=1e-15)


def test_merge_is_the_union():
  rows = features()
  for cut in (1, 17, 105):
    parts = in_blocks(rows[:cut]), in_blocks(rows[cut:], 3)
    assert_close(moments.merge(*parts), in_blocks(rows))
  a, b = parts
  ab, ba = moments.merge(a, b), moments.merge(b, a)
  np.testing.assert_array_equal(ab.mean, ba.mean)
  np.testing.assert_array_equal(ab.scatter, ba.scatter)


def test_nothing_adds_nothing():
  rows = features()
  some, none = in_blocks(rows), moments.empty(DIMENSION)
  assert some.update(rows[:0]) is some
  assert moments.merge(some, none) is some
  assert moments.merge(none, some) is some
  assert moments.merge(none, none).count == 0


def test_updates_leave_the_old_moments_alone():
  rows = features()
  old = in_blocks(rows[:50])
  scatter, mean = old.scatter.copy(), old.mean.copy()
  old.update(rows[50:])
  np.testing.assert_array_equal(old.scatter, scatter)
  np.testing.assert_array_equal(old.mean, mean)


def test_packing_is_exact_through_jax():
  # JAX without float64 rounds a float64 array; the words come through.
  found = in_blocks(features(), 40)
  assert jax.numpy.asarray(found.mean).dtype == np.float32
  words = np.asarray(jax.numpy.asarray(moments._pack(found)))
  back = moments._unpack(words, DIMENSION)
  assert back.count == found.count
  np.testing.assert_array_equal(back.mean, found.mean)
  np.testing.assert_array_equal(back.scatter, found.scatter)


def test_gather_on_one_host_is_the_identity():
  found = in_blocks(features())
  assert moments.gather(found) is found


def test_gather_merges_hosts_of_which_some_have_seen_nothing(monkeypatch):
  rows = features()
  hosts = [rows[:60], rows[:0], rows[60:61], rows[61:]]
  words = [moments._pack(in_blocks(part)) for part in hosts]
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda own: np.stack(words)
  )
  assert_close(moments.gather(in_blocks(hosts[0])), in_blocks(rows))


@pytest.mark.slow
def test_two_hosts_get_the_same_bits(tmp_path):
  code = """
    import sys
    import jax, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
    from bcm_jax.metrics import moments
    host = jax.process_index()
    rows = np.load(sys.argv[1] + "/rows.npy")[host::2]
    found = moments.gather(moments.from_features(rows))
    np.savez(f"{sys.argv[1]}/{host}.npz", count=found.count,
             mean=found.mean, scatter=found.scatter)
    """
  rows = features()
  np.save(tmp_path / "rows.npy", rows)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  root = pathlib.Path(__file__).resolve().parents[2]

  def host(index):
    return subprocess.run(
      [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), address,
       str(index)],
      env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
      capture_output=True, text=True, timeout=120, check=False,
    )

  with ThreadPoolExecutor(2) as pool:
    for done in pool.map(host, range(2)):
      assert done.returncode == 0, done.stderr
  first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
  expected = moments.merge(in_blocks(rows[::2]), in_blocks(rows[1::2]))
  for name in ("count", "mean", "scatter"):
    np.testing.assert_array_equal(first[name], second[name])
    np.testing.assert_array_equal(first[name], getattr(expected, name))


def test_bad_features_are_user_errors():
  rows = features(50)
  begun = in_blocks(rows)
  broken = rows.copy()
  broken[7, 3], broken[9, 0] = np.nan, np.inf
  with pytest.raises(UserError, match=r"row 57 .* \(2 such rows of 50"):
    begun.update(broken)
  with pytest.raises(UserError, match="row 7 "):
    moments.from_features(broken, 3)
  with pytest.raises(UserError, match=r"\[n, 12\]"):
    begun.update(rows[:, :4])
  with pytest.raises(UserError, match="features: got int64"):
    begun.update(rows.astype(np.int64))
  with pytest.raises(UserError, match="features: got shape"):
    moments.from_features(rows[0])
  with pytest.raises(UserError, match="12 and 4 features"):
    moments.merge(begun, moments.empty(4))
  with pytest.raises(UserError, match="1 images"):
    moments.empty(DIMENSION).update(rows[:1]).gaussian()
