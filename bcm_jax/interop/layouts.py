"""How one tensor is laid out there and here: pairs of inverse functions."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Convert = Callable[[np.ndarray], np.ndarray]


class Layout(NamedTuple):
  """Converts one tensor; `theirs` undoes `ours` to the last bit."""

  ours: Convert
  theirs: Convert


class Entry(NamedTuple):
  """One parameter: its path in our tree, its foreign name, its layout."""

  path: tuple[str, ...]
  name: str
  layout: Layout


SAME = Layout(lambda v: v, lambda v: v)
# PyTorch's convolution OIHW is HWIO here.
CONV = Layout(
    lambda v: v.transpose(2, 3, 1, 0), lambda v: v.transpose(3, 2, 0, 1)
)
# PyTorch's linear [out, in] is [in, out] here.
DENSE = Layout(lambda v: v.T, lambda v: v.T)
# A 1x1 convolution (of one or two dimensions) there is a dense layer here.
POINTWISE = Layout(
    lambda v: v.reshape(v.shape[:2]).T, lambda v: v.T[:, :, None, None]
)
# A scalar that has a batch axis there.
SCALAR = Layout(lambda v: v.reshape(()), lambda v: v)


def interleaved_qkv(channels: int, heads: int) -> Layout:
  """Output channels (head, channel, q/k/v) there, thirds [Q | K | V] here.

  Works on the last axis of a kernel or bias, so chain it after another layout.
  """
  order = np.arange(3 * channels).reshape(heads, channels // heads, 3)
  to_ours = order.transpose(2, 0, 1).ravel()
  to_theirs = np.argsort(to_ours)
  return Layout(lambda v: v[..., to_ours], lambda v: v[..., to_theirs])


def chain(*layouts: Layout) -> Layout:
  """One layout after another, in the direction from there to here."""

  def ours(v):
    for layout in layouts:
      v = layout.ours(v)
    return v

  def theirs(v):
    for layout in reversed(layouts):
      v = layout.theirs(v)
    return v

  return Layout(ours, theirs)


def torch_leaf(leaf: str, ndim: int) -> tuple[str, Layout]:
  """PyTorch's leaf name and the layout of a parameter of ours by its rank."""
  if leaf == "kernel":
    return "weight", CONV if ndim == 4 else DENSE
  return {"scale": "weight", "embedding": "weight"}.get(leaf, leaf), SAME
