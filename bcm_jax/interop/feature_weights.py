"""Weights of feature networks: one table of names for both directions."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import layouts
from bcm_jax.interop import weight_files

Tensors = dict[str, np.ndarray]
# Every parameter of a network, with our shape of it.
Table = list[tuple[layouts.Entry, tuple[int, ...]]]

_SHOWN = 8


def read_tensors(path: str) -> Tensors:
  """All tensors of a weight file by name, whatever group they are in.

  Raises:
    UserError: see `weight_files.read`; or two groups have a name in common.
  """
  tensors: Tensors = {}
  for group, found in weight_files.read(path).groups.items():
    twice = sorted(tensors.keys() & found.keys())
    if twice:
      raise UserError(
          f"{path}: {group!r} and another group both hold {_shown(twice)}; save"
          " one state dict"
      )
    tensors |= found
  return tensors


def to_tree(table: Table, tensors: Tensors, network: str) -> dict[str, Any]:
  """Our parameters; every tensor is used exactly once.

  Args:
    table: of all parameters.
    tensors: by their foreign names, in their own dtype.
    network: as errors call it.

  Raises:
    UserError: tensors missing, left over, or of other shapes.
  """
  names = {entry.name for entry, _ in table}
  problems = [
      f"{what}: {_shown(sorted(those))}"
      for what, those in (
          ("missing", names - tensors.keys()),
          ("left over", tensors.keys() - names),
      ) if those
  ]
  if problems:
    raise UserError(
        f"these are not the weights of {network}; {'; '.join(problems)}"
    )
  flat = {}
  for entry, shape in table:
    value = tensors[entry.name]
    expected = entry.layout.theirs(np.broadcast_to(0, shape)).shape
    if value.shape != expected:
      raise UserError(
          f"tensor {entry.name!r} has shape {value.shape}, but {network} has "
          f"{expected}; use its published weights"
      )
    flat[entry.path] = np.array(entry.layout.ours(value), order="C")
  return traverse_util.unflatten_dict(flat)


def to_tensors(table: Table, params: Mapping[str, Any]) -> Tensors:
  """The tensors of our parameters under their foreign names."""
  flat = traverse_util.flatten_dict(params)
  return {
      entry.name: np.array(
          entry.layout.theirs(np.asarray(flat[entry.path])), order="C"
      )
      for entry, _ in table
  }


def _shown(names: list[str]) -> str:
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more
