"""Starts a two-time network from a one-time network."""

import flax.linen as nn
import jax.numpy as jnp


def add_second_time(network: nn.Module, one_time: dict, fresh: dict) -> dict:
  """Parameters of a two-time network that start as a one-time network.

  The second branch starts as a copy of the first and the align layer as
  [I | 0], so that the network output does not change and does not depend on
  the end level (Li & He, cm_train.py).

  Args:
    network: names its layers: SECOND_TIME, {layer of the second branch: layer
      of the first}, and ALIGN.
    one_time: parameters of the same network with two_time=False.
    fresh: parameters of the network with two_time=True; gives the align
      layer's size and dtype.

  Raises:
    ValueError: if one_time lacks the first branch.
  """
  params = dict(one_time)
  for second, first in network.SECOND_TIME.items():
    if first not in one_time:
      raise ValueError(
          f"the parameters have no {first!r}: they are of another network "
          f"than {type(network).__name__}"
      )
    params[second] = one_time[first]
  align = fresh[network.ALIGN]["kernel"]
  half = align.shape[1]
  params[network.ALIGN] = {"kernel": jnp.eye(2 * half, half, dtype=align.dtype)}
  return params


# Last layers of CTM's branch, one in every block.
_END_PROJECTIONS = ("affine_s", "emb_layers_s_1")


def add_end(one_time: dict, fresh: dict, zero: bool) -> dict:
  """Parameters of a network with end levels in its blocks, from one without.

  What both have is taken over, the branch of the end level stays fresh (Kim et
  al., CTM, cm_train.py); labels of an augmentation are left out. A network that
  has the branch is taken as it is.

  Args:
    one_time: parameters of the same network with two_time=False.
    fresh: parameters of the network with end_branch='blocks'.
    zero: start the branch's last layers at 0, so that the network output does
      not change and does not depend on the end level.
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
