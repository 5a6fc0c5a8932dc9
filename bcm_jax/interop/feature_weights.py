"""Conversion of feature network weights, with one name table per network."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import layouts
from bcm_jax.interop import weight_files

Tensors = dict[str, np.ndarray]
# (entry, Flax shape) of every parameter of a network.
Table = list[tuple[layouts.Entry, tuple[int, ...]]]

_SHOWN = 8


def read_tensors(path: str) -> Tensors:
  """Returns the tensors of all groups of a weight file by name.

  Raises:
    UserError: see `weight_files.read`; or a name occurs in two groups.
  """
  tensors: Tensors = {}
  for group, group_tensors in weight_files.read(path).groups.items():
    duplicates = sorted(tensors.keys() & group_tensors.keys())
    if duplicates:
      raise UserError(
          f"{path}: got {_shown(duplicates)} in {group!r} and in another group,"
          " expected unique names; save one state dict"
      )
    tensors |= group_tensors
  return tensors


def to_tree(table: Table, tensors: Tensors, network: str) -> dict[str, Any]:
  """Converts published tensors to Flax parameters.

  Args:
    table: name table of all parameters.
    tensors: published name -> tensor; the dtype is kept.
    network: name of the network for error messages.

  Returns:
    The parameter tree. Every tensor is used exactly once.

  Raises:
    UserError: tensors are missing, unexpected or have another shape.
  """
  names = {entry.name for entry, _ in table}
  problems = [
      f"{problem}: {_shown(sorted(problem_names))}"
      for problem, problem_names in (
          ("missing", names - tensors.keys()),
          ("unexpected", tensors.keys() - names),
      ) if problem_names
  ]
  if problems:
    raise UserError(
        f"tensors: expected the weights of {network}; {'; '.join(problems)}"
    )
  flat = {}
  for entry, shape in table:
    value = tensors[entry.name]
    expected = entry.layout.to_torch(np.broadcast_to(0, shape)).shape
    if value.shape != expected:
      raise UserError(
          f"tensor {entry.name!r}: got shape {value.shape}, expected "
          f"{expected}; use the published weights of {network}"
      )
    flat[entry.path] = np.array(entry.layout.to_flax(value), order="C")
  return traverse_util.unflatten_dict(flat)


def to_tensors(table: Table, params: Mapping[str, Any]) -> Tensors:
  """Converts Flax parameters to tensors under their published names."""
  flat = traverse_util.flatten_dict(params)
  return {
      entry.name: np.array(
          entry.layout.to_torch(np.asarray(flat[entry.path])), order="C"
      )
      for entry, _ in table
  }


def _shown(names: list[str]) -> str:
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more
