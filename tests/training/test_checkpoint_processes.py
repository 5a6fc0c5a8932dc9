"""Checkpoints of killed jobs, other device counts and several hosts."""

from concurrent.futures import ThreadPoolExecutor
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bcm_jax.checkpoint.checkpoint import Checkpoints


def run_python(code, *args, **env):
  root = pathlib.Path(__file__).resolve().parents[2]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **env}
  return subprocess.run(
      [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
      env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(tmp_path):
  """Dies when the arrays are written but the step is not committed."""
  with Checkpoints(tmp_path / "c") as ckpt:
    ckpt.save(3, {"x": np.full(1000, 3.0)}, {})
  done = run_python("""
      import os, sys
      import numpy as np
      from bcm_jax.checkpoint.checkpoint import Checkpoints
      def die(*args, **kwargs):
        os._exit(9)
      # The commit is a rename; the arrays are written by native code.
      os.rename = os.replace = die
      ckpt = Checkpoints(sys.argv[1])
      ckpt.save(4, {"x": np.ones(1000)}, {})
      ckpt.wait()
      """, tmp_path / "c")
  assert done.returncode == 9, done.stderr
  (left,) = (tmp_path / "c").glob("4.*")
  assert list(left.rglob("manifest.ocdbt"))
  with Checkpoints(tmp_path / "c") as ckpt:
    assert ckpt.all_steps() == [3]
    assert ckpt.restore({"x": np.zeros(1000)})[0] == 3
    assert ckpt.save(4, {"x": np.full(1000, 4.0)}, {})
    step, state, _ = ckpt.restore({"x": np.zeros(1000)})
  assert step == 4
  np.testing.assert_array_equal(state["x"], 4.0)


@pytest.mark.slow
def test_restore_onto_other_devices_is_exact(tmp_path):
  done = run_python("""
      import sys
      import jax, numpy as np
      from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      from bcm_jax.checkpoint.checkpoint import Checkpoints
      assert jax.device_count() == 4
      def sharding(n, *spec):
        return NamedSharding(Mesh(np.array(jax.devices()[:n]), ("d",)),
                             P(*spec))
      x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
      with Checkpoints(sys.argv[1]) as ckpt:
        ckpt.save(1, {"x": jax.device_put(x, sharding(4, "d"))}, {})
        for n, spec in ((4, ("d",)), (2, (None, "d")), (2, ()), (1, ())):
          want = sharding(n, *spec)
          like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=want)
          _, state, _ = ckpt.restore({"x": like})
          assert state["x"].sharding == want
          assert np.array_equal(state["x"], x)
      """, tmp_path / "c",
      XLA_FLAGS="--xla_force_host_platform_device_count=4")
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_hosts_agree_on_the_fallback(tmp_path):
  """One array over two processes, of which one finds the step damaged."""
  code = """
      import sys
      import jax, numpy as np
      from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      jax.config.update("jax_cpu_collectives_implementation", "gloo")
      jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
      from bcm_jax.checkpoint import checkpoint, digests
      mesh = Mesh(np.array(jax.devices()), ("d",))
      x = np.arange(8, dtype=np.float32)
      def array(scale):
        return jax.make_array_from_callback(
            (8,), NamedSharding(mesh, P("d")), lambda i: scale * x[i])
      with checkpoint.Checkpoints(sys.argv[1]) as ckpt:
        ckpt.save(1, {"x": array(1)}, {})
        ckpt.save(2, {"x": array(2)}, {})
        ckpt.wait()
        if jax.process_index() == 1:
          read_step = checkpoint.read_step
          def damaged(folder, *version):
            if folder.name == "2":
              raise digests.Damage("bad memory")
            return read_step(folder, *version)
          checkpoint.read_step = damaged
        step, state, _ = ckpt.restore({"x": array(0)})
        assert step == 1, step
        for shard in state["x"].addressable_shards:
          assert np.array_equal(shard.data, x[shard.index])
        assert ckpt.all_steps() == [1]
        assert ckpt.save(2, {"x": array(3)}, {})
      """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  with ThreadPoolExecutor(2) as pool:
    jobs = [pool.submit(run_python, code, tmp_path / "c", address, i)
            for i in range(2)]
  for job in jobs:
    assert job.result().returncode == 0, job.result().stderr
  assert (tmp_path / "damaged" / "2-0").exists()
  assert Checkpoints(tmp_path / "c").all_steps() == [1, 2]
