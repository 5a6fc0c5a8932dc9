"""Devices: one mesh of global arrays under jit, and a pmap adapter.

Data parallel over the axis 'data': the state is replicated, the batch cut by
examples. Under pmap each device runs the same step function on its slice.
"""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from bcm_jax import errors
from bcm_jax.training import step as steps

Tree = Any
AXIS = "data"


def use_cores(count: int, batch_size: int) -> None:
  """Makes JAX split the host into devices, where it runs on a CPU.

  XLA hardly splits small convolutions over threads, so devices of one core
  each keep more cores busy than one device of all. Must come before the first
  use of JAX; XLA_FLAGS that set a number of devices win.

  Args:
    count: devices; 0 takes one a usable core, at most 8, such that they
      divide the batch evenly.
    batch_size: examples of a (micro)batch.
  """
  if not count:
    if hasattr(os, "sched_getaffinity"):
      cores = len(os.sched_getaffinity(0))
    else:
      cores = os.cpu_count() or 1
    count = max(
        n for n in range(1, min(cores, 8) + 1) if batch_size % n == 0
    )
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in flags:
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A one-axis mesh over all devices of all hosts."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
      (len(devices),), (AXIS,), devices=devices, axis_types=(AxisType.Auto,)
  )


def check_batch(batch_size: int, microbatches: int, devices: int) -> None:
  """Raises UserError where a batch cannot be cut evenly."""
  if batch_size % (microbatches * devices):
    raise errors.UserError(
        f"training.batch_size={batch_size} cannot be cut into "
        f"{microbatches} microbatches on each of {devices} devices; make it "
        f"a multiple of {microbatches * devices}"
    )


@dataclasses.dataclass(frozen=True)
class Jit:
  """Runs a step on global arrays over a mesh.

  The batch handed to `batch` is this host's slice of the global batch.
  """

  mesh: Mesh

  def replicate(self, tree: Tree) -> Tree:
    """Puts a host tree on every device."""
    sharding = NamedSharding(self.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)

  def batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Cuts a host batch by examples over the devices."""
    sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
    return {
        k: jax.make_array_from_process_local_data(sharding, v)
        for k, v in batch.items()
    }

  def compile(self, step: steps.Step) -> steps.Step:
    """Compiles a step made with axis_name=None; donates the state."""
    return jax.jit(step, static_argnames="phase", donate_argnums=0)

  def fetch(self, tree: Tree) -> Tree:
    """Brings a replicated tree back as one copy."""
    return tree


@dataclasses.dataclass(frozen=True)
class Pmap:
  """Runs the same step function under pmap, a leading axis of devices."""

  devices: tuple[jax.Device, ...]

  def replicate(self, tree: Tree) -> Tree:
    """Stacks a tree once for each device."""
    n = len(self.devices)
    return jax.tree.map(lambda x: np.stack([np.asarray(x)] * n), tree)

  def batch(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits [B, ...] into [devices, B / devices, ...]."""
    n = len(self.devices)
    return {
        k: v.reshape(n, len(v) // n, *v.shape[1:]) for k, v in batch.items()
    }

  def compile(self, step: steps.Step) -> steps.Step:
    """Compiles a step made with axis_name='data'."""
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(0, 0, None, None),
        static_broadcasted_argnums=3,
        donate_argnums=0,
        devices=self.devices,
    )

  def fetch(self, tree: Tree) -> Tree:
    """Takes the first device's copy."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
