"""Plans over many images, some at a time, on all devices of this host."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from bcm_jax.config import build
from bcm_jax.data import image_source
from bcm_jax.generate import guides
from bcm_jax.sampling import guidance
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import rng
from bcm_jax.training import sharding

Params = Any


@dataclasses.dataclass(frozen=True)
class BatchedSampler:
  """Runs plans over many images, some at a time, on all devices.

  One executable serves every plan: levels are arguments of the flow map. A
  second one is the guided map, where section sample asks for guidance.

  Attributes:
    at_a_time: batch_size, rounded up so that it can be cut over the devices.
  """

  experiment: build.Experiment
  params: Params
  batch_size: int

  def __post_init__(self):
    mesh = sharding.make_mesh(jax.local_devices())
    devices = sharding.Jit(mesh)
    method = self.experiment.method
    function = jax.jit(
        lambda p, x, t, u, labels: method.flow_map(p)(x, t, u, labels)
    )
    params = devices.place(self.params)
    object.__setattr__(self, "_devices", devices)
    object.__setattr__(
        self, "_flow_map", lambda *args: function(params, *args)
    )
    object.__setattr__(self, "_guided_map", None)
    guide = guides.open_guide(self.experiment)
    if guide is not None:
      weight = self.experiment.config.sample.guidance
      other = params if guide.params is None else devices.place(guide.params)
      guided = jax.jit(
          lambda p, q, *args: guidance.guided(
              method.flow_map(p), guide.flow_map(q), weight
          )(*args)
      )
      object.__setattr__(
          self, "_guided_map", lambda *args: guided(params, other, *args)
      )
    object.__setattr__(self, "_params", params)
    per = mesh.devices.size
    object.__setattr__(self, "at_a_time", -(-self.batch_size // per) * per)

  def __call__(
      self,
      plan: sampling_plan.Plan,
      images: np.ndarray,
      labels: np.ndarray | None,
      keys: np.ndarray,
  ) -> np.ndarray:
    """Runs a plan on images [n, H, W, C] at its start level.

    Args:
      plan: what to do.
      images: float32.
      labels: [n] int32; ignored by an unconditional network.
      keys: [n] keys of the noise that the plan adds.

    Returns:
      [n, H, W, C] float32.
    """
    return self._in_batches(
        lambda x, labels, keys: samplers.run(
            plan, self._flow_map, x, labels, keys, self._guided_map
        ),
        images, labels, keys,
    )

  def resized(self, batch_size: int) -> "BatchedSampler":
    """The same network, so many images at a time; parameters are shared."""
    return dataclasses.replace(
        self, params=self._params, batch_size=batch_size
    )

  def apply(
      self,
      function: Callable[..., Any],
      arrays: Any,
      labels: np.ndarray | None,
      keys: np.ndarray,
  ) -> Any:
    """Runs function(flow map, arrays, labels, keys) over some images at a time.

    Only the flow map is jitted: a function may call it many times and compile
    nothing of its own.

    Args:
      function: of what stands above, to a tree of arrays [b, ...].
      arrays: tree of arrays [n, ...].
      labels: [n] int32; None is handed on to an unconditional network.
      keys: [n].

    Returns:
      The function's tree, of arrays [n, ...].
    """
    return self._in_batches(
        lambda x, labels, keys: function(self._flow_map, x, labels, keys),
        arrays, labels, keys,
    )

  def transform(
      self,
      function: Callable[..., Any],
      images: np.ndarray,
      labels: np.ndarray | None,
  ) -> Any:
    """Runs function(flow map, x, labels), jitted, over images [n, H, W, C].

    The function returns a tree of arrays [b, ...]; so does this, of [n, ...].
    """
    method = self.experiment.method
    jitted = jax.jit(
        lambda p, x, labels: function(method.flow_map(p), x, labels)
    )
    return self._in_batches(
        lambda x, labels, keys: jitted(self._params, x, labels), images, labels
    )

  def _in_batches(self, function, arrays, labels, keys=None) -> Any:
    """function(arrays, labels, keys) over parts of them, on all devices."""
    leaves, tree = jax.tree.flatten(arrays)
    given = {f"x{i}": leaf for i, leaf in enumerate(leaves)}
    if keys is not None:
      given["keys"] = jax.random.key_data(keys)
    if labels is not None and self.experiment.num_classes is not None:
      given["labels"] = labels
    results = []
    for first in range(0, len(leaves[0]), self.at_a_time):
      part = {
          k: np.asarray(v[first : first + self.at_a_time])
          for k, v in given.items()
      }
      count = len(part["x0"])
      # The last batch is filled up, so that nothing compiles twice.
      part = self._devices.batch(
          {k: _fill(v, self.at_a_time) for k, v in part.items()}
      )
      wrapped = None
      if keys is not None:
        wrapped = jax.random.wrap_key_data(part["keys"])
      x = function(
          tree.unflatten([part[f"x{i}"] for i in range(len(leaves))]),
          part.get("labels"), wrapped,
      )
      results.append(
          jax.tree.map(lambda a, count=count: np.asarray(a)[:count], x)
      )
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _fill(array: np.ndarray, size: int) -> np.ndarray:
  missing = size - len(array)
  return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def generate(
    experiment: build.Experiment,
    runner: BatchedSampler,
    plan: sampling_plan.Plan,
    labels: np.ndarray | None,
    index: np.ndarray,
    seed: int,
) -> np.ndarray:
  """Generates images number `index` [n] of a seed: uint8 [n, H, W, C].

  Image i depends on (seed, i) and its label alone. labels are those of all
  images, or None.
  """
  images = []
  for first in range(0, len(index), runner.at_a_time):
    part = index[first : first + runner.at_a_time]
    noise = samplers.start_noise(
        rng.example_keys(seed, "sample/start", 0, jnp.asarray(part)),
        experiment.image_shape, experiment.method.sigma_max,
    )
    keys = rng.example_keys(seed, "sample/added", 0, jnp.asarray(part))
    asked = None if labels is None else labels[part]
    images.append(
        image_source.to_uint8(runner(plan, np.asarray(noise), asked, keys))
    )
  return np.concatenate(images)


def on_all_hosts(n: int, rows: Callable[[np.ndarray], Any]) -> Any:
  """Rows 0 .. n - 1, each computed by one host, all returned on every host.

  Args:
    n: number of rows.
    rows: indices [m] -> tree of arrays [m, ...]; each host is asked for a
      contiguous part, the last one for some rows twice if n is not a multiple.
  """
  hosts = jax.process_count()
  each = -(-n // hosts)
  mine = np.minimum(np.arange(each) + each * jax.process_index(), n - 1)
  result = rows(mine)
  if hosts == 1:
    return result
  gathered = multihost_utils.process_allgather(result, tiled=True)
  return jax.tree.map(lambda a: np.asarray(a)[:n], gathered)


def test_images(
    experiment: build.Experiment, count: int | None
) -> dict[str, np.ndarray]:
  """`count` images spread evenly over the test split, all for None.

  Folders are in the order of their classes: the first ones would be of one.
  """
  source = experiment.source("test")
  count = len(source) if count is None else min(count, len(source))
  return source.fetch(np.arange(count) * len(source) // count)


def invert_and_reconstruct(
    experiment: build.Experiment,
    runner: BatchedSampler,
    plan: sampling_plan.Plan,
    batch: dict[str, np.ndarray],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Inverts by a plan, generates in one step: (latents, uint8 images)."""
  index = jnp.arange(len(batch["image"]))
  keys = rng.example_keys(seed, "invert/added", 0, index)
  latents = runner(
      plan, image_source.to_float(batch["image"]), batch["label"], keys
  )
  back = sampling_plan.ancestral((), experiment.levels)
  images = runner(back, latents, batch["label"], keys)
  return latents, image_source.to_uint8(images)
