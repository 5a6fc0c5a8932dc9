"""Starts a two-time network from a one-time network, output unchanged."""

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
