"""Splits the tree of a weight file into flat tensors and plain values."""

from typing import Any

import numpy as np

from bcm_jax import errors
from bcm_jax.interop import torch_files
from bcm_jax.utils import unpickle

Tensors = dict[str, np.ndarray]

# Limits of the work: a few bytes can describe an infinite tree or huge names.
_MAX_DEPTH = 100
_MAX_NODES = 1_000_000
_MAX_NAME = 4096

_LEAVES = (torch_files.Tensor, unpickle.Array, np.ndarray)

# Replaces a subtree that contains only tensors.
_REMOVED = object()


class Walker:
  """Splits trees. Use one walker per file, since it limits the total work.

  Attributes:
    modules: class name and constructor arguments of each module, by dotted
      name.
  """

  def __init__(self, separator: str = "."):
    self.modules: dict[str, dict[str, Any]] = {}
    self._separator, self._nodes = separator, 0

  def split(self, tree: Any) -> tuple[Tensors, Any]:
    """Splits a tree into (tensors by joined name, plain values or None).

    Raises:
      UserError: two tensors of one name, a tensor outside of its storage, or a
        tree that contains itself or is too large.
    """
    tensors: Tensors = {}
    rest = self._walk(tree, "", tensors)
    return tensors, None if rest is _REMOVED else rest

  def plain(self, tree: Any, depth: int = 0) -> Any:
    """Replaces tensors and objects of a tree by descriptions."""
    return self._walk(tree, "", None, depth)

  def _walk(
      self, value: Any, name: str, out: Tensors | None, depth: int = 0
  ) -> Any:
    # Counts nodes; 64 characters of a name take as much memory as a node.
    self._nodes += 1 + len(name) // 64
    self._nodes += len(value) if isinstance(value, set) else 0
    if self._nodes > _MAX_NODES or depth > _MAX_DEPTH:
      raise errors.UserError(
          f"file: got more than {_MAX_NODES} values, or objects that contain"
          f" themselves or are nested deeper than {_MAX_DEPTH}; save a plain"
          " state dict"
      )
    if isinstance(value, _LEAVES):
      return self._leaf(value, name, out)
    if isinstance(value, unpickle.Object):
      return self._object(value, name, out, depth + 1)
    if isinstance(value, set):
      return sorted(map(str, value))
    if isinstance(value, (dict, list, tuple)):
      items = value.items() if isinstance(value, dict) else enumerate(value)
      plain = [
          (k, rest) for k, v in items
          if (rest := self._walk(v, self._join(name, k), out, depth + 1))
          is not _REMOVED
      ]
      if value and not plain:
        return _REMOVED
      return dict(plain) if isinstance(value, dict) else [v for _, v in plain]
    if isinstance(value, unpickle.Global):
      return value.name
    if isinstance(value, np.generic):
      return value.item()
    return "a storage" if isinstance(value, torch_files.Storage) else value

  def _leaf(self, value: Any, name: str, out: Tensors | None) -> Any:
    if isinstance(value, unpickle.Array):
      value = value.value
      unpickle.require(value is not None, "NumPy array: got no state")
    is_tensor = isinstance(value, torch_files.Tensor)
    if out is None:
      return f"{value.dtype} {value.size if is_tensor else value.shape}"
    where = unpickle.shown(name)
    unpickle.require(
        name not in out, f"tensor {where}: got two of this name, expected one"
    )
    out[name] = torch_files.as_array(value, name) if is_tensor else value
    return _REMOVED

  def _object(
      self, value: unpickle.Object, name: str, out: Tensors | None, depth: int
  ) -> Any:
    described = dict(class_name=value.class_name)
    for key in ("init_args", "init_kwargs"):
      if value.state.get("_" + key) is not None:
        described[key] = self.plain(value.state["_" + key], depth)
    if out is None:
      return described
    self.modules[name] = described
    for kind in ("_parameters", "_buffers", "_modules"):
      part = value.state.get(kind) or {}
      unpickle.require(
          type(part) is dict,
          f"{kind}: got {unpickle.shown(part)}, expected dict",
      )
      for key, child in part.items():
        if child is not None:
          self._walk(child, self._join(name, key), out, depth)
    return _REMOVED if name else described

  def _join(self, name: str, key: Any) -> str:
    joined = f"{name}{self._separator}{key}" if name else str(key)
    unpickle.require(
        len(joined) <= _MAX_NAME,
        f"name of a tensor: got {len(joined)} characters, expected at most"
        f" {_MAX_NAME}",
    )
    return joined


def groups_of(
    tree: Any, separator: str = "."
) -> tuple[dict[str, Tensors], dict[str, Any]]:
  """Splits a checkpoint into groups of tensors and plain values.

  Each entry of the outermost dict that contains tensors is a group. The group
  '' contains the entries that are tensors, or a whole tree of another type.

  Args:
    tree: dicts, lists, objects, tensors and plain values.
    separator: separator between the parts of a name.

  Returns:
    groups: {group: {name: array}}.
    metadata: the outermost dict without its tensors.

  Raises:
    UserError: as `Walker.split`, or the tree contains no tensor.
  """
  walker = Walker(separator)
  entries = tree if type(tree) is dict else {"": tree}
  loose = {k: v for k, v in entries.items() if isinstance(v, _LEAVES)}
  groups, metadata = {"": walker.split(loose)[0]}, {}
  for key, value in entries.items():
    if key in loose:
      continue
    tensors, rest = walker.split(value)
    name = str(key)
    is_repeated = name in metadata or tensors and groups.get(name)
    unpickle.require(
        not is_repeated,
        f"entry {unpickle.shown(name)}: got two of this name, expected one",
    )
    metadata[name] = rest
    if tensors:
      groups[name] = tensors
  groups = {name: group for name, group in groups.items() if group}
  if not groups:
    raise errors.UserError(
        f"file: got no tensors (only {_summary(tree)}), expected at least one"
    )
  return groups, {k: v for k, v in metadata.items() if v is not None}


def network_of(tree: Any) -> tuple[dict[str, Tensors], dict[str, Any]]:
  """Splits the network of an EDM pickle: 'ema' if it exists, else 'net'.

  Args:
    tree: content of the pickle.

  Returns:
    groups: {'ema' or 'net': {dotted name: array}}, parameters and buffers in
      the saved dtype.
    metadata: class_name, init_args and init_kwargs (constructor arguments) and
      attributes (plain attributes) of the network; modules, {dotted name: the
      first three entries for each submodule}; descriptions of the other
      entries of the file by name.

  Raises:
    UserError: as `Walker.split`, or a pickle without a network.
  """
  entries = tree if type(tree) is dict else {}
  group = next((name for name in ("ema", "net") if name in entries), None)
  network, walker = entries.get(group), Walker()
  tensors, rest = walker.split(network)
  if not tensors:
    raise errors.UserError(
        f"pickle: got {_summary(tree)}, expected a network with tensors under"
        " 'ema' or 'net'; use a network snapshot of EDM or EDM2"
    )
  metadata = {str(k): walker.plain(v) for k, v in entries.items() if k != group}
  if isinstance(network, unpickle.Object):
    attributes = {
        name: walker.plain(value)
        for name, value in network.state.items()
        if not str(name).startswith("_")
        and not isinstance(value, unpickle.Object)
    }
    metadata |= rest | dict(attributes=attributes, modules=walker.modules)
  return {group: tensors}, metadata


def _summary(tree: Any) -> str:
  """Returns the first keys of a dict, or a description of another value."""
  items = list(tree)[:20] if type(tree) is dict else [tree]
  return ", ".join(map(unpickle.shown, items))[:400]
