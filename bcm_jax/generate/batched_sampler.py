"""Batched sampling on all local devices."""

from collections.abc import Callable
import functools
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
from bcm_jax.utils import batching

Params = Any


class BatchedSampler:
  """Runs sampling plans on many images in batches, on all local devices.

  Noise levels are arguments of the flow map, so that all plans use the same
  executable. With guidance in config section `sample`, the guided flow map is a
  second executable.

  Attributes:
    experiment: method, network and config.
    params: parameters of the network, on the devices.
    batch_size: batch size, rounded up to a multiple of the number of devices.
  """

  def __init__(
      self, experiment: build.Experiment, params: Params, batch_size: int
  ):
    mesh = sharding.make_mesh(jax.local_devices())
    self._devices = devices = sharding.Jit(mesh)
    self.experiment, method = experiment, experiment.method
    self.params = params = devices.place(params)
    num_devices = mesh.devices.size
    self.batch_size = -(-batch_size // num_devices) * num_devices
    flow_map = jax.jit(
        lambda p, x, t, u, labels: method.flow_map(p)(x, t, u, labels)
    )
    self._flow_map = functools.partial(flow_map, params)
    self._guided_map = None
    guide = guides.open_guide(experiment)
    if guide is not None:
      weight = experiment.config.sample.guidance
      guide_params = (
          params if guide.params is None else devices.place(guide.params)
      )
      guided_map = jax.jit(
          lambda p, q, *args: guidance.guided(
              method.flow_map(p), guide.flow_map(q), weight
          )(*args)
      )
      self._guided_map = functools.partial(guided_map, params, guide_params)

  def __call__(
      self,
      plan: sampling_plan.Plan,
      images: np.ndarray,
      labels: np.ndarray | None,
      keys: np.ndarray,
  ) -> np.ndarray:
    """Runs a plan on images at its start level.

    Args:
      plan: jumps and noise injections.
      images: [n, H, W, C] float32.
      labels: [n] int32 or None; ignored by an unconditional network.
      keys: [n] keys of the noise that the plan adds.

    Returns:
      [n, H, W, C] float32, images at the end level of the plan.
    """
    return self._in_batches(
        lambda x, labels, keys: samplers.run(
            plan, self._flow_map, x, labels, keys, self._guided_map
        ),
        images, labels, keys,
    )

  def resized(self, batch_size: int) -> "BatchedSampler":
    """Returns a sampler with the same parameters and another batch size."""
    return BatchedSampler(self.experiment, self.params, batch_size)

  def apply(
      self,
      function: Callable[..., Any],
      arrays: Any,
      labels: np.ndarray | None,
      keys: np.ndarray,
  ) -> Any:
    """Runs function(flow_map, arrays, labels, keys) in batches.

    Only the flow map is jitted: a function with many calls of it compiles one.

    Args:
      function: maps batches [b, ...] to a tree of arrays [b, ...].
      arrays: tree of arrays [n, ...].
      labels: [n] int32; None for an unconditional network.
      keys: [n] keys.

    Returns:
      The tree of the function, with arrays [n, ...].
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
    """Runs function(flow_map, x, labels), jitted as a whole, in batches.

    Args:
      function: maps images x [b, H, W, C] and labels [b] or None to a tree of
        arrays [b, ...].
      images: [n, H, W, C] float32.
      labels: [n] int32; None for an unconditional network.

    Returns:
      The tree of the function, with arrays [n, ...].
    """
    method = self.experiment.method
    jitted = jax.jit(
        lambda p, x, labels: function(method.flow_map(p), x, labels)
    )
    return self._in_batches(
        lambda x, labels, keys: jitted(self.params, x, labels), images, labels
    )

  def _in_batches(self, function, arrays, labels, keys=None) -> Any:
    """Computes function(arrays, labels, keys) batch by batch."""
    inputs = {"arrays": arrays}
    if keys is not None:
      inputs["keys"] = jax.random.key_data(keys)
    if labels is not None and self.experiment.num_classes is not None:
      inputs["labels"] = labels
    results = []
    for batch, count in batching.padded_batches(inputs, self.batch_size):
      batch = self._devices.batch(batch)
      if keys is not None:
        batch["keys"] = jax.random.wrap_key_data(batch["keys"])
      result = function(
          batch["arrays"], batch.get("labels"), batch.get("keys")
      )
      results.append(
          jax.tree.map(lambda a, count=count: np.asarray(a)[:count], result)
      )
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def generate(
    experiment: build.Experiment,
    runner: BatchedSampler,
    plan: sampling_plan.Plan,
    labels: np.ndarray | None,
    index: np.ndarray,
    seed: int,
) -> np.ndarray:
  """Generates images by their index in a seeded sequence.

  Image i depends only on (seed, i, labels[i]).

  Args:
    experiment: image shape and noise levels.
    runner: sampler with the parameters.
    plan: sampling plan.
    labels: int32 labels of all images of the sequence, or None.
    index: [n] int, positions in the sequence.
    seed: seed of the sequence.

  Returns:
    [n, H, W, C] uint8.
  """
  images = []
  for first in range(0, len(index), runner.batch_size):
    part = index[first : first + runner.batch_size]
    noise = samplers.start_noise(
        rng.example_keys(seed, "sample/start", 0, jnp.asarray(part)),
        experiment.image_shape, experiment.method.sigma_max,
    )
    keys = rng.example_keys(seed, "sample/added", 0, jnp.asarray(part))
    part_labels = None if labels is None else labels[part]
    sampled = runner(plan, np.asarray(noise), part_labels, keys)
    images.append(
        image_source.to_uint8(sampled, experiment.method.rounding)
    )
  return np.concatenate(images)


def on_all_hosts(n: int, rows: Callable[[np.ndarray], Any]) -> Any:
  """Distributes the computation of rows over hosts and gathers the result.

  Args:
    n: number of rows.
    rows: indices [m] -> tree of arrays [m, ...]. Each host computes a
      contiguous block; if n is not divisible, the last row is repeated.

  Returns:
    Tree of arrays [n, ...], on every host.
  """
  hosts = jax.process_count()
  block = -(-n // hosts)
  indices = np.minimum(np.arange(block) + block * jax.process_index(), n - 1)
  result = rows(indices)
  if hosts == 1:
    return result
  gathered = multihost_utils.process_allgather(result, tiled=True)
  return jax.tree.map(lambda a: np.asarray(a)[:n], gathered)


def test_images(
    experiment: build.Experiment, count: int | None
) -> dict[str, np.ndarray]:
  """Returns test images, spaced evenly over the split.

  Image folders are sorted by class, so that the first images would all have the
  same class.

  Args:
    experiment: the data set.
    count: number of images; None is all.

  Returns:
    Batch with 'image' [count, H, W, C] uint8 and 'label' [count].
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
  """Encodes images to latents by a plan and decodes them in one step.

  Args:
    experiment: noise levels.
    runner: sampler with the parameters.
    plan: inversion plan.
    batch: 'image' [n, H, W, C] uint8 and 'label' [n].
    seed: seed of the noise that the plan adds.

  Returns:
    (latents [n, H, W, C] float32 at sigma_max, images [n, H, W, C] uint8).
  """
  index = jnp.arange(len(batch["image"]))
  keys = rng.example_keys(seed, "invert/added", 0, index)
  latents = runner(
      plan, image_source.to_float(batch["image"]), batch["label"], keys
  )
  decoding = sampling_plan.ancestral((), experiment.levels)
  images = runner(decoding, latents, batch["label"], keys)
  return latents, image_source.to_uint8(images, experiment.method.rounding)
