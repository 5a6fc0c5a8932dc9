"""Tensor layout conversions between PyTorch and Flax."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Convert = Callable[[np.ndarray], np.ndarray]


class Layout(NamedTuple):
  """Pair of exactly inverse layout conversions of one tensor."""

  to_flax: Convert
  to_torch: Convert


class Entry(NamedTuple):
  """Mapping of one parameter.

  Attributes:
    path: path in the Flax parameter tree.
    name: name of the published tensor.
    layout: conversion between the two layouts.
  """

  path: tuple[str, ...]
  name: str
  layout: Layout


SAME = Layout(lambda v: v, lambda v: v)
# Convolution kernel: OIHW in PyTorch, HWIO in Flax.
CONV = Layout(
    lambda v: v.transpose(2, 3, 1, 0), lambda v: v.transpose(3, 2, 0, 1)
)
# Dense kernel: [out, in] in PyTorch, [in, out] in Flax.
DENSE = Layout(lambda v: v.T, lambda v: v.T)
# A 1x1 convolution (1D or 2D) in PyTorch, a dense layer in Flax.
POINTWISE = Layout(
    lambda v: v.reshape(v.shape[:2]).T, lambda v: v.T[:, :, None, None]
)
# A scalar, with a leading axis of size 1 in PyTorch.
SCALAR = Layout(lambda v: v.reshape(()), lambda v: v)


def interleaved_qkv(channels: int, heads: int) -> Layout:
  """Returns the layout of QKV output channels that are interleaved per channel.

  Channels are ordered (head, channel, q/k/v) in the published tensor and
  [Q | K | V] in Flax. It permutes the last axis of a kernel or bias in Flax
  layout, so chain it after another layout.

  Args:
    channels: number of channels of each of q, k and v.
    heads: number of attention heads.
  """
  order = np.arange(3 * channels).reshape(heads, channels // heads, 3)
  to_flax = order.transpose(2, 0, 1).ravel()
  to_torch = np.argsort(to_flax)
  return Layout(lambda v: v[..., to_flax], lambda v: v[..., to_torch])


def chain(*layouts: Layout) -> Layout:
  """Composes layouts; `to_flax` applies them in order."""

  def to_flax(v):
    for layout in layouts:
      v = layout.to_flax(v)
    return v

  def to_torch(v):
    for layout in reversed(layouts):
      v = layout.to_torch(v)
    return v

  return Layout(to_flax, to_torch)


def torch_leaf(leaf: str, ndim: int) -> tuple[str, Layout]:
  """Returns the PyTorch name and the layout of a Flax parameter.

  Args:
    leaf: last key of the parameter path, such as 'kernel'.
    ndim: rank of the parameter.
  """
  if leaf == "kernel":
    return "weight", CONV if ndim == 4 else DENSE
  return {"scale": "weight", "embedding": "weight"}.get(leaf, leaf), SAME
