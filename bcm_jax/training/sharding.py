"""Devices: one named mesh of global arrays under jit, and a pmap adapter.

The mesh has the axes 'data' and 'fsdp'. Examples are cut over both; the state
is cut over 'fsdp' where a rule says so and is otherwise on every device. XLA
adds the collectives. Under pmap each device runs the same step function on
its slice of the examples and holds the whole state.

Every backend takes steps in calls: one call may be several steps, scanned on
the devices, so that small networks do not wait for the host.
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
# The axis that a step under pmap averages over.
AXIS = DATA
# Smaller tensors cost more to gather than they take to keep.
_MIN_CUT_SIZE = 2**14


def make_mesh(
    devices: Sequence[jax.Device] | None = None, fsdp: int = 1
) -> Mesh:
  """The mesh ('data', 'fsdp') over all devices of all hosts.

  Args:
    devices: other devices than all.
    fsdp: devices that share one copy of the state, 0 for all; the next smaller
      divisor of the number of devices where it is none.
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
  """Returns the number of microbatches of a step that fit the devices.

  Args:
    batch_size: of the global batch.
    devices: that share it.
    limit: most examples of a part on a device; 0 is no limit.

  Raises:
    UserError: the batch cannot be cut evenly over the devices.
  """
  if batch_size % devices:
    raise errors.UserError(
        f"training.batch_size={batch_size} cannot be cut evenly over "
        f"{devices} devices; make it a multiple of {devices}"
    )
  each = batch_size // devices
  if not limit:
    return 1
  return min(m for m in range(1, each + 1)
             if each % m == 0 and each // m <= limit)


# Rules ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
  """Sharding rule of tensors whose path matches.

  Attributes:
    pattern: regular expression, searched in 'networks/student/params/...'.
    spec: 'replicate', 'fsdp' (cut along the longest axis that divides evenly),
      or the mesh axis of each dimension, None for none; such a rule is for
      tensors of as many dimensions.
  """

  pattern: str
  spec: str | tuple[str | None, ...]


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
  """Rules of a config: 'fsdp', 'label_emb=replicate', 'kernel$=- - - fsdp'.

  The first rule that fits a tensor counts; where none does it is replicated.

  Raises:
    UserError: a rule that means nothing.
  """
  rules = []
  for text in texts:
    pattern, _, spec = text.rpartition("=")
    words = tuple(None if w == "-" else w for w in spec.split())
    try:
      re.compile(pattern)
    except re.error as e:
      raise errors.UserError(
          f"parallel.sharding: {pattern!r} is no regular expression ({e})"
      ) from e
    if words in (("replicate",), (FSDP,)) and "=" not in spec:
      rules.append(Rule(pattern, words[0]))
    elif words and pattern and set(words) <= {None, DATA, FSDP}:
      rules.append(Rule(pattern, words))
    else:
      raise errors.UserError(
          f"parallel.sharding has {text!r}; expected 'replicate', 'fsdp', "
          "'PATTERN=replicate', 'PATTERN=fsdp', or 'PATTERN=- - - fsdp' with a "
          "word for each dimension: '-', 'data' or 'fsdp'"
      )
  return tuple(rules)


def spec_of(
    rules: Sequence[Rule], path: str, shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  """Returns the sharding of a tensor.

  Raises:
    UserError: a rule cuts it where it cannot be cut evenly.
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
            f"parallel.sharding: {rule.pattern!r} cuts {path} of shape "
            f"{list(shape)} by {mesh.shape[axis]}, which does not divide "
            f"{size}; cut another dimension, or replicate it"
        )
    # As XLA writes it; jit would compile anew for the same with a None more.
    used = max((i for i, a in enumerate(rule.spec) if a), default=-1) + 1
    return PartitionSpec(*rule.spec[:used])
  return PartitionSpec()


def _longest_axis(shape: tuple[int, ...], count: int) -> PartitionSpec:
  fitting = [i for i, size in enumerate(shape) if size % count == 0 and size]
  if count == 1 or not fitting or math.prod(shape) < _MIN_CUT_SIZE:
    return PartitionSpec()
  # Of equal ones the last: channels out, which convolutions keep innermost.
  best = max(fitting, key=lambda i: (shape[i], i))
  return PartitionSpec(*[FSDP if i == best else None for i in range(best + 1)])


# Backends ------------------------------------------------------------------


def _stack(trees: Sequence[Tree]) -> Tree:
  return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *trees)


def _scanned(step: train_step.Step) -> train_step.Step:
  """step(state, batches, curricula, phase) over a leading axis of steps."""

  def many(state, batches, curricula, phase):
    return jax.lax.scan(
        lambda s, inputs: step(s, *inputs, phase), state, (batches, curricula)
    )

  return many


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  if isinstance(x, jax.Array) and x.sharding == sharding:
    return x
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


@dataclasses.dataclass(frozen=True)
class Jit:
  """Runs a step on global arrays over a mesh.

  Attributes:
    mesh: see make_mesh.
    rules: where tensors of the state lie.
    local: run the step on each device's part of the batch, so that gradients
      of microbatches are added up there and reduced once; XLA would reduce
      them every time. Needs a replicated state.
  """

  mesh: Mesh
  rules: tuple[Rule, ...] = ()
  local: bool = False

  @property
  def axis_name(self) -> tuple[str, str] | None:
    """Axis that the step averages over; None if its batch is global."""
    return (DATA, FSDP) if self.local else None

  @property
  def devices(self) -> int:
    """Devices that share a batch."""
    return self.mesh.devices.size

  def shardings(self, tree: Tree) -> Tree:
    """Returns shardings of a state, given its arrays or their shapes."""

    def one(path, leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      spec = spec_of(self.rules, name, tuple(np.shape(leaf)), self.mesh)
      return NamedSharding(self.mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)

  def batch_sharding(self, stacked: bool = False) -> NamedSharding:
    """Of a batch [B, ...], or of several [steps, B, ...]."""
    axes = (DATA, FSDP)
    spec = PartitionSpec(None, axes) if stacked else PartitionSpec(axes)
    return NamedSharding(self.mesh, spec)

  def abstract(self, tree: Tree) -> Tree:
    """Returns shapes and shardings of a state, the template of a restore."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree, self.shardings(tree),
    )

  def create(self, make: Callable[..., Tree], *args: Any) -> Tree:
    """Computes make(*args) with the shardings of its result."""
    shardings = self.shardings(jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*args)

  def place(self, tree: Tree) -> Tree:
    """Places a tree, the same on every host, by its shardings."""

    return jax.tree.map(_put, tree, self.shardings(tree))

  def replicate(self, tree: Tree) -> Tree:
    """Puts a tree, the same on every host, on every device."""
    sharding = NamedSharding(self.mesh, PartitionSpec())
    return jax.tree.map(lambda x: _put(x, sharding), tree)

  def batch(self, *batches: Batch) -> dict[str, jax.Array]:
    """This host's slices of one or several global batches, as global arrays."""
    several = len(batches) > 1
    sharding = self.batch_sharding(several)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x),
        _stack(batches) if several else batches[0],
    )

  def compile(
      self, step: train_step.Step, several: bool = False
  ) -> train_step.Step:
    """Compiles a step made with this axis_name; donates the state.

    Args:
      step: see steps.make_step.
      several: of a call of several steps: batches and curricula come stacked,
        metrics go stacked.
    """
    step = _scanned(step) if several else step
    whole = PartitionSpec()
    cut = self.batch_sharding(several).spec

    def placed(state, batch, curriculum, phase):
      run = functools.partial(step, phase=phase)
      if self.local:
        run = jax.shard_map(
          run,
          mesh=self.mesh,
          in_specs=(whole, cut, whole),
          out_specs=whole,
          check_vma=False,
        )
      new, metrics = run(state, batch, curriculum)
      # XLA would be free to leave a part elsewhere, and compile twice.
      new = jax.lax.with_sharding_constraint(new, self.shardings(new))
      return new, metrics

    return jax.jit(placed, static_argnames="phase", donate_argnums=0)

  def fetch(self, tree: Tree) -> Tree:
    """Brings a replicated tree back as one copy."""
    return tree


@dataclasses.dataclass(frozen=True)
class Pmap:
  """Runs the same step function under pmap, a leading axis of local devices."""

  local_devices: tuple[jax.Device, ...]
  axis_name = AXIS

  @property
  def devices(self) -> int:
    """Devices that share a batch, those of other hosts too."""
    return len(self.local_devices) * jax.process_count()

  def abstract(self, tree: Tree) -> Tree:
    """Shapes of a state, restored to the host."""
    return jax.tree.map(
      lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree
    )

  def create(self, make: Callable[..., Tree], *args: Any) -> Tree:
    """make(*args), a copy on every device."""
    return self.place(jax.jit(make)(*args))

  def place(self, tree: Tree) -> Tree:
    """Stacks a tree once for each device."""
    n = len(self.local_devices)
    return jax.tree.map(lambda x: np.stack([np.asarray(x)] * n), tree)

  def replicate(self, tree: Tree) -> Tree:
    """Arguments that pmap hands to every device as they are."""
    return tree

  def batch(self, *batches: Batch) -> Batch:
    """Splits [B, ...] into [devices, B / devices, ...].

    Several batches become [devices, steps, B / devices, ...].
    """
    n = len(self.local_devices)

    def split(v):
      return v.reshape(n, len(v) // n, *v.shape[1:])

    cut = [{k: split(v) for k, v in batch.items()} for batch in batches]
    if len(cut) == 1:
      return cut[0]
    return {k: np.stack([c[k] for c in cut], axis=1) for k in cut[0]}

  def compile(
    self, step: train_step.Step, several: bool = False
  ) -> train_step.Step:
    """Compiles a step made with axis_name='data'; see Jit.compile."""
    return jax.pmap(
      _scanned(step) if several else step,
      axis_name=AXIS,
      in_axes=(0, 0, None, None),
      static_broadcasted_argnums=3,
      donate_argnums=0,
      devices=self.local_devices if jax.process_count() == 1 else None,
    )

  def fetch(self, tree: Tree) -> Tree:
    """Takes the first device's copy, of arrays and of what `place` made."""

    def first(x):
      local = isinstance(x, np.ndarray)
      return x[0] if local else x.addressable_shards[0].data[0]

    return jax.tree.map(first, tree)


Backend = Jit | Pmap


def curricula(method: Any, first: int, count: int) -> Tree:
  """Returns the curricula of `count` steps, stacked, on the host."""
  each = [method.curriculum(first + i) for i in range(count)]
  return jax.tree.map(np.asarray, each[0]) if count == 1 else _stack(each)


def calls(
  method: Any, first: int, total: int, most: int, stops: Sequence[int]
) -> list[tuple[int, int]]:
  """Cuts steps first .. total - 1 into calls of at most `most` steps.

  A call never crosses a change of phase nor a multiple of one of `stops` or of
  `most` itself, so that where a run was interrupted changes no later call.

  Returns:
    (first step, number of steps) of every call.
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
