"""Parallelism: jit with global arrays on a named mesh, and a pmap adapter.

The mesh has the axes 'data' and 'fsdp'. Batches are sharded over both; the
state is sharded over 'fsdp' where a rule matches and replicated otherwise. XLA
adds the collectives. Under pmap each device runs the same step function on its
shard of the batch with a replicated state.

One call of a compiled step may run several training steps in a scan on the
devices, so that small networks do not wait for the host.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from bcm_jax import errors
from bcm_jax.training import train_step

Tree = Any
Batch = dict[str, np.ndarray]
DATA, FSDP = "data", "fsdp"
# The axis over which a step under pmap averages gradients.
AXIS = DATA
# Number of elements below which 'fsdp' replicates a tensor: the communication
# would cost more than the memory saved.
_MIN_SHARD_SIZE = 2**14


def make_mesh(
    devices: Sequence[jax.Device] | None = None, fsdp: int = 1
) -> Mesh:
  """Returns the mesh with axes ('data', 'fsdp').

  Args:
    devices: devices of the mesh; None is all devices of all hosts.
    fsdp: number of devices that share one copy of the state, rounded down to a
      divisor of the number of devices; 0 is all devices.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  size = n if fsdp == 0 else max(
      k for k in range(1, min(fsdp, n) + 1) if n % k == 0
  )
  return jax.make_mesh(
      (n // size, size), (DATA, FSDP), devices=devices,
      axis_types=(AxisType.Auto, AxisType.Auto),
  )


def microbatches(batch_size: int, devices: int, limit: int) -> int:
  """Returns the number of microbatches (gradient accumulation) of a step.

  Args:
    batch_size: size of the global batch.
    devices: number of devices that share the batch.
    limit: maximum size of a microbatch per device; 0 is unlimited.

  Raises:
    UserError: batch_size is not a multiple of the number of devices.
  """
  if batch_size % devices:
    raise errors.UserError(
        f"training.batch_size: got {batch_size}, expected a multiple of "
        f"{devices}, the number of devices; change it"
    )
  local_batch = batch_size // devices
  if not limit:
    return 1
  return min(m for m in range(1, local_batch + 1)
             if local_batch % m == 0 and local_batch // m <= limit)


# Rules ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
  """Sharding of the tensors whose path matches a pattern.

  Attributes:
    pattern: regular expression, searched in 'networks/student/params/...'.
    spec: 'replicate'; 'fsdp', which shards the longest dimension that is
      divisible; or a tuple with the mesh axis of each dimension (None: not
      sharded), which matches only tensors of that rank.
  """

  pattern: str
  spec: str | tuple[str | None, ...]


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
  """Parses rules such as 'fsdp', 'label_emb=replicate', 'kernel$=- - - fsdp'.

  The first rule that matches a tensor applies; a tensor without a matching rule
  is replicated.

  Args:
    texts: parallel.sharding of the config.

  Raises:
    UserError: a rule cannot be parsed.
  """
  rules = []
  for text in texts:
    pattern, _, spec = text.rpartition("=")
    words = tuple(None if w == "-" else w for w in spec.split())
    try:
      re.compile(pattern)
    except re.error as e:
      raise errors.UserError(
          f"parallel.sharding: got pattern {pattern!r}, expected a regular "
          f"expression ({e}); correct it"
      ) from e
    if words in (("replicate",), (FSDP,)) and "=" not in spec:
      rules.append(Rule(pattern, words[0]))
    elif words and pattern and set(words) <= {None, DATA, FSDP}:
      rules.append(Rule(pattern, words))
    else:
      raise errors.UserError(
          f"parallel.sharding: got {text!r}, expected 'replicate', 'fsdp', "
          "'PATTERN=replicate', 'PATTERN=fsdp' or 'PATTERN=- - - fsdp'; "
          "write '-', 'data' or 'fsdp' for each dimension"
      )
  return tuple(rules)


def spec_of(
    rules: Sequence[Rule], path: str, shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  """Returns the sharding of a tensor.

  Args:
    rules: in order of priority.
    path: path of the tensor in the state, 'networks/student/params/...'.
    shape: its shape.
    mesh: see make_mesh.

  Raises:
    UserError: the rule shards a dimension that is not divisible.
  """
  for rule in rules:
    if not re.search(rule.pattern, path):
      continue
    if rule.spec == "replicate":
      return PartitionSpec()
    if rule.spec == FSDP:
      return _longest_axis(shape, mesh.shape[FSDP])
    if len(rule.spec) != len(shape):
      continue
    for size, axis in zip(shape, rule.spec, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise errors.UserError(
            f"parallel.sharding: got {rule.pattern!r}, which shards {path} of "
            f"shape {list(shape)} by {mesh.shape[axis]}, expected a divisor of "
            f"{size}; shard another dimension or replicate the tensor"
        )
    # XLA's canonical form has no trailing None; jit would recompile for them.
    used = max((i for i, a in enumerate(rule.spec) if a), default=-1) + 1
    return PartitionSpec(*rule.spec[:used])
  return PartitionSpec()


def _longest_axis(shape: tuple[int, ...], count: int) -> PartitionSpec:
  divisible = [i for i, size in enumerate(shape) if size % count == 0 and size]
  if count == 1 or not divisible or math.prod(shape) < _MIN_SHARD_SIZE:
    return PartitionSpec()
  # Among equal sizes the last axis: a convolution's output channels.
  best = max(divisible, key=lambda i: (shape[i], i))
  return PartitionSpec(*[FSDP if i == best else None for i in range(best + 1)])


# Backends ------------------------------------------------------------------


def _stack(trees: Sequence[Tree]) -> Tree:
  return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *trees)


def _scanned(step: train_step.Step) -> train_step.Step:
  """Returns the step scanned over batches and curricula, [steps, ...] each."""

  def scan(state, batches, curricula, phase):
    return jax.lax.scan(
        lambda s, inputs: step(s, *inputs, phase), state, (batches, curricula)
    )

  return scan


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  if isinstance(x, jax.Array) and x.sharding == sharding:
    return x
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


@dataclasses.dataclass(frozen=True)
class Jit:
  """Backend that runs a step under jit, on global arrays over a mesh.

  Attributes:
    mesh: see make_mesh.
    rules: sharding rules of the state.
    local: whether to run the step on each device's shard of the batch, under
      shard_map. Gradients of microbatches are then accumulated locally and
      reduced once; XLA would reduce them after every microbatch. Requires a
      replicated state.
  """

  mesh: Mesh
  rules: tuple[Rule, ...] = ()
  local: bool = False

  @property
  def axis_name(self) -> tuple[str, str] | None:
    """Mesh axes over which the step averages; None for a global batch."""
    return (DATA, FSDP) if self.local else None

  @property
  def devices(self) -> int:
    """Number of devices that share a batch."""
    return self.mesh.devices.size

  def shardings(self, tree: Tree) -> Tree:
    """Returns the sharding of each tensor of a state.

    Args:
      tree: the state, as arrays or jax.ShapeDtypeStruct.
    """

    def sharding(path, leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      spec = spec_of(self.rules, name, tuple(np.shape(leaf)), self.mesh)
      return NamedSharding(self.mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)

  def batch_sharding(self, stacked: bool = False) -> NamedSharding:
    """Returns the sharding of a batch [B, ...], or [steps, B, ...] if stacked.
    """
    axes = (DATA, FSDP)
    spec = PartitionSpec(None, axes) if stacked else PartitionSpec(axes)
    return NamedSharding(self.mesh, spec)

  def abstract(self, tree: Tree) -> Tree:
    """Returns shapes, dtypes and shardings of a state, to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree, self.shardings(tree),
    )

  def create(self, make: Callable[..., Tree], *args: Any) -> Tree:
    """Computes make(*args), a state, with sharded outputs."""
    shardings = self.shardings(jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*args)

  def place(self, tree: Tree) -> Tree:
    """Shards a state that is equal on all hosts."""
    return jax.tree.map(_put, tree, self.shardings(tree))

  def replicate(self, tree: Tree) -> Tree:
    """Replicates a tree that is equal on all hosts."""
    sharding = NamedSharding(self.mesh, PartitionSpec())
    return jax.tree.map(lambda x: _put(x, sharding), tree)

  def batch(self, *batches: Batch) -> dict[str, jax.Array]:
    """Returns global arrays from this host's shards of the batches.

    Args:
      *batches: one batch or several, with arrays [local B, ...].

    Returns:
      Arrays [B, ...], or [steps, B, ...] for several batches.
    """
    several = len(batches) > 1
    sharding = self.batch_sharding(several)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x),
        _stack(batches) if several else batches[0],
    )

  def compile(
      self, step: train_step.Step, several: bool = False
  ) -> train_step.Step:
    """Compiles a step; the state is donated.

    Args:
      step: see train_step.make_step; its axis_name must be this backend's.
      several: whether a call runs several steps: batches, curricula and metrics
        then have a leading axis of steps.
    """
    step = _scanned(step) if several else step
    replicated = PartitionSpec()
    sharded = self.batch_sharding(several).spec

    def sharded_step(state, batch, curriculum, phase):
      run = functools.partial(step, phase=phase)
      if self.local:
        run = jax.shard_map(
          run,
          mesh=self.mesh,
          in_specs=(replicated, sharded, replicated),
          out_specs=replicated,
          check_vma=False,
        )
      new, metrics = run(state, batch, curriculum)
      # Without this XLA may choose other output shardings and recompile.
      new = jax.lax.with_sharding_constraint(new, self.shardings(new))
      return new, metrics

    return jax.jit(sharded_step, static_argnames="phase", donate_argnums=0)

  def fetch(self, tree: Tree) -> Tree:
    """Returns the tree itself: a global array is one copy."""
    return tree


@dataclasses.dataclass(frozen=True)
class Pmap:
  """Backend that runs a step under pmap; arrays have a leading device axis."""

  local_devices: tuple[jax.Device, ...]
  axis_name = AXIS

  @property
  def devices(self) -> int:
    """Number of devices that share a batch, over all hosts."""
    return len(self.local_devices) * jax.process_count()

  def abstract(self, tree: Tree) -> Tree:
    """Returns host arrays of the state's shapes, to restore into."""
    return jax.tree.map(
      lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree
    )

  def create(self, make: Callable[..., Tree], *args: Any) -> Tree:
    """Computes make(*args), replicated on all devices."""
    return self.place(jax.jit(make)(*args))

  def place(self, tree: Tree) -> Tree:
    """Replicates a tree: arrays [...] become [local devices, ...]."""
    n = len(self.local_devices)
    return jax.tree.map(lambda x: np.stack([np.asarray(x)] * n), tree)

  def replicate(self, tree: Tree) -> Tree:
    """Returns the tree itself: pmap broadcasts these arguments."""
    return tree

  def batch(self, *batches: Batch) -> Batch:
    """Shards this host's batches over its devices.

    Args:
      *batches: one batch or several, with arrays [B, ...].

    Returns:
      Arrays [devices, B / devices, ...], or [devices, steps, B / devices, ...]
      for several batches.
    """
    n = len(self.local_devices)

    def split(v):
      return v.reshape(n, len(v) // n, *v.shape[1:])

    sharded = [{k: split(v) for k, v in batch.items()} for batch in batches]
    if len(sharded) == 1:
      return sharded[0]
    return {k: np.stack([s[k] for s in sharded], axis=1) for k in sharded[0]}

  def compile(
    self, step: train_step.Step, several: bool = False
  ) -> train_step.Step:
    """Compiles a step of axis_name='data'; see Jit.compile."""
    return jax.pmap(
      _scanned(step) if several else step,
      axis_name=AXIS,
      in_axes=(0, 0, None, None),
      static_broadcasted_argnums=3,
      donate_argnums=0,
      devices=self.local_devices if jax.process_count() == 1 else None,
    )

  def fetch(self, tree: Tree) -> Tree:
    """Returns the first device's copy of pmap's outputs or of `place`."""

    def first(x):
      local = isinstance(x, np.ndarray)
      return x[0] if local else x.addressable_shards[0].data[0]

    return jax.tree.map(first, tree)


Backend = Jit | Pmap


def curricula(method: Any, first: int, count: int) -> Tree:
  """Returns the curricula of consecutive steps, on the host.

  Args:
    method: a base.Method.
    first: first step.
    count: number of steps.

  Returns:
    The curriculum of the step; for count > 1 with a leading axis of steps.
  """
  per_step = [method.curriculum(first + i) for i in range(count)]
  if count == 1:
    return jax.tree.map(np.asarray, per_step[0])
  return _stack(per_step)


def calls(
  method: Any, first: int, total: int, most: int, stops: Sequence[int]
) -> list[tuple[int, int]]:
  """Groups steps first .. total - 1 into calls of at most `most` steps.

  A call does not cross a change of phase, or a multiple of `most` or of one of
  `stops`; the calls after an interruption are therefore those of an
  uninterrupted run.

  Args:
    method: a base.Method.
    first: first step.
    total: number of the last step.
    most: maximum number of steps per call.
    stops: periods, in steps, of actions of the host such as saving.

  Returns:
    (first step, number of steps) of each call.
  """
  result, start = [], first
  while start < total:
    end = min([total, *((start // s + 1) * s for s in (most, *stops))])
    phase = method.phase(start)
    end = next(
      (s for s in range(start + 1, end) if method.phase(s) != phase), end
    )
    result.append((start, end - start))
    start = end
  return result
