"""Initialization of flow-map networks from one-time networks."""

import flax.linen as nn
import jax.numpy as jnp


def add_second_time(network: nn.Module, one_time: dict, fresh: dict) -> dict:
  """Initializes BCM's two-time network from a one-time network.

  The end-level embedding is a copy of the first and the align layer is [I | 0],
  so that the network output is unchanged and does not depend on the end level
  (Li & He, 2024, cm_train.py).

  Args:
    network: module with SECOND_TIME, {layer of the end-level embedding: layer
      of the first}, and ALIGN, the align layer.
    one_time: parameters of the same network with two_time=False.
    fresh: initialized parameters with two_time=True; defines shape and dtype of
      the align layer.

  Returns:
    Parameters of the two-time network.

  Raises:
    ValueError: `one_time` has no time embedding of this network.
  """
  params = dict(one_time)
  for second, first in network.SECOND_TIME.items():
    if first not in one_time:
      raise ValueError(
          f"one_time: {first!r} is missing, expected parameters of "
          f"{type(network).__name__}"
      )
    params[second] = one_time[first]
  align = fresh[network.ALIGN]["kernel"]
  half = align.shape[1]
  params[network.ALIGN] = {"kernel": jnp.eye(2 * half, half, dtype=align.dtype)}
  return params


# Last layer of CTM's end-level embedding in every block.
_END_PROJECTIONS = ("affine_s", "emb_layers_s_1")


def add_end(one_time: dict, fresh: dict, zero: bool) -> dict:
  """Initializes CTM's two-time network from a one-time network.

  Copies the shared parameters and keeps the initialization of the end-level
  embedding (Kim et al., 2024, cm_train.py); the layer of the augmentation
  labels is dropped. Parameters that include the embedding are returned
  unchanged.

  Args:
    one_time: parameters of the same network with two_time=False.
    fresh: initialized parameters with end_branch='blocks'.
    zero: set the last layers of the end-level embedding to 0, so that the
      network output is unchanged and does not depend on the end level.

  Returns:
    Parameters of the two-time network.
  """
  if _has_end(one_time):
    return one_time

  def merge(old, new, name):
    if not isinstance(new, dict):
      if old is not None:
        return old
      return jnp.zeros_like(new) if zero and name in _END_PROJECTIONS else new
    old = {} if old is None else old
    return {
        k: merge(old.get(k), v, name if name in _END_PROJECTIONS else k)
        for k, v in new.items()
    } | {k: v for k, v in old.items() if k not in new and k != "map_augment"}

  return merge(one_time, fresh, "")


def _has_end(params: dict) -> bool:
  return any(
      name in _END_PROJECTIONS or isinstance(value, dict) and _has_end(value)
      for name, value in params.items()
  )
