"""Joining, sharing cores, and being told to go, on one host.

What two do: test_two_processes.py.
"""

import contextlib
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.training import multihost


@pytest.mark.parametrize("given", [
    ("h:1", None, None), (None, 2, None), (None, None, 0), ("h:1", 2, None),
])
def test_half_an_address_is_refused(given):
  with pytest.raises(errors.UserError, match="expected all three"):
    multihost.connect(*given)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_outside_is_refused(number):
  with pytest.raises(errors.UserError, match="expected 0 .. 1"):
    multihost.connect("127.0.0.1:1", 2, number)


def test_without_a_cluster_it_is_one_process():
  multihost.connect()
  assert jax.process_count() == 1


@pytest.mark.parametrize("asked, batch, processes, cores, devices", [
    (3, 64, 1, 8, 3), (0, 64, 1, 8, 8), (0, 64, 1, 99, 8), (0, 6, 1, 4, 3),
    (0, 7, 1, 4, 1), (0, 64, 16, 8, 4), (0, 2, 4, 8, 1),
])
def test_cores_become_devices_that_divide_the_batch(
    monkeypatch, asked, batch, processes, cores, devices
):
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(
      os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False
  )
  updates = []
  monkeypatch.setattr(jax.config, "update", lambda *x: updates.append(x))
  multihost.use_cores(asked, batch, processes)
  assert updates == [("jax_num_cpu_devices", devices)]


def test_a_number_of_devices_in_the_environment_wins(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  monkeypatch.setattr(
      jax.config, "update", lambda *x: pytest.fail(f"set {x}")
  )
  multihost.use_cores(2, 64)


def test_alone_one_agrees_with_oneself():
  assert multihost.all_agree(True) and not multihost.all_agree(False)
  multihost.raise_everywhere(None)
  with pytest.raises(errors.UserError, match="mine"):
    multihost.raise_everywhere(errors.UserError("mine"))


def test_copies_share_no_memory_and_are_whole():
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
  x = jnp.arange(8.0)
  tree = {"cut": jax.device_put(x, cut), "one": x, "host": np.arange(3)}
  copies = multihost.to_host(tree)
  for name, value in tree.items():
    assert isinstance(copies[name], np.ndarray)
    np.testing.assert_array_equal(copies[name], np.asarray(value))
    assert not np.shares_memory(copies[name], np.asarray(value))


def never(status):
  pytest.fail(f"ended with {status}")


def notified(number=signal.SIGTERM):
  """Sends a signal to this process; its handler has run on return."""
  os.kill(os.getpid(), number)
  signal.sigtimedwait([], 0.01)


def test_a_notice_waits_where_it_is_deferred():
  notice = multihost.PreemptionSignal(end=never)
  before = signal.getsignal(signal.SIGTERM)
  with notice.listening():
    with pytest.raises(errors.Preempted, match="nothing to save"):
      with notice.deferred():
        assert not notice.reached(0)
        notified()
        assert notice.reached(1) and notice.reached(2)
      pytest.fail("went on after the end of what was deferred")
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("compiling", [False, True])
def test_with_nothing_to_save_a_notice_ends_the_process_at_once(
    capfd, compiling
):
  calls = []
  notice = multihost.PreemptionSignal(
      lambda: calls.append("released"), calls.append
  )
  with notice.listening(), contextlib.suppress(errors.Preempted):
    with notice.deferred() if compiling else contextlib.nullcontext():
      notified()
      assert calls == ["released", errors.EXIT_PREEMPTED]
  assert capfd.readouterr().err.count("preempted: nothing to save") == 1


def test_ctrl_c_saves_and_a_second_one_does_not(capfd):
  notice = multihost.PreemptionSignal(end=never)
  before = signal.getsignal(signal.SIGINT)
  with notice.listening():
    with pytest.raises(KeyboardInterrupt):  # Nothing to save yet.
      notified(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      with notice.deferred():
        assert not notice.reached(0)
        notified(signal.SIGINT)
        assert notice.reached(1)
        notified(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) == before
  assert capfd.readouterr().err.count("interrupted; saving") == 1


def test_ctrl_c_on_one_of_several_processes_is_a_notice_of_jax(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
      multihost.multihost_utils, "reached_preemption_sync_point",
      lambda call: False,
  )
  seen = []
  before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args[0]))
  notice = multihost.PreemptionSignal(end=never)
  try:
    with notice.listening(), notice.deferred():
      notice.reached(0)
      notified(signal.SIGINT)
      notified(0)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert seen == [signal.SIGTERM]


def test_what_the_loop_raises_is_not_hidden_by_a_notice():
  notice = multihost.PreemptionSignal(end=never)
  with notice.listening(), pytest.raises(KeyError):
    with notice.deferred():
      assert not notice.reached(0)
      notified()
      raise KeyError


def test_without_a_notice_nothing_is_raised():
  notice = multihost.PreemptionSignal()
  with notice.listening(), notice.deferred():
    assert not notice.reached(0)


def test_in_a_thread_nothing_listens():
  before, seen = signal.getsignal(signal.SIGTERM), []

  def in_thread():
    with multihost.PreemptionSignal().listening():
      seen.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=in_thread)
  thread.start()
  thread.join()
  assert seen == [before]


def test_jax_tells_once_and_the_notice_remembers(monkeypatch):
  """With several processes, the point to stop at may be rolled back over."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
      multihost.multihost_utils, "reached_preemption_sync_point",
      lambda call: call == 3,
  )
  notice = multihost.PreemptionSignal()
  assert [notice.reached(call) for call in range(6)] == [False] * 3 + [True] * 3
