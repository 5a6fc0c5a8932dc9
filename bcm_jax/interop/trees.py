"""Splits the tree of a weight file into flat tensors and plain values."""

from typing import Any

import numpy as np

from bcm_jax import errors
from bcm_jax.interop import torch_files
from bcm_jax.utils import unpickle

Tensors = dict[str, np.ndarray]

# A few bytes can describe an endless tree, or endless names.
_MAX_DEPTH = 100
_MAX_NODES = 1_000_000
_MAX_NAME = 4096

_LEAVES = (torch_files.Tensor, unpickle.Array, np.ndarray)

# Replaces a subtree that held only tensors.
_GONE = object()


class Walker:
  """Splits trees; one walker per file, since it bounds the work.

  Attributes:
    modules: class and constructor's arguments of each module, by dotted name.
  """

  def __init__(self, separator: str = "."):
    self.modules: dict[str, dict[str, Any]] = {}
    self._separator, self._nodes = separator, 0

  def split(self, tree: Any) -> tuple[Tensors, Any]:
    """Returns the tensors of a tree by joined names, and the rest or None.

    Raises:
      UserError: two tensors of one name, one outside of its storage, a tree
        that contains itself or is too large.
    """
    tensors: Tensors = {}
    rest = self._walk(tree, "", tensors)
    return tensors, None if rest is _GONE else rest

  def plain(self, tree: Any, depth: int = 0) -> Any:
    """Returns a tree with its tensors and objects described in words."""
    return self._walk(tree, "", None, depth)

  def _walk(
      self, value: Any, name: str, out: Tensors | None, depth: int = 0
  ) -> Any:
    # Names take memory like values, about 64 characters as much as one.
    self._nodes += 1 + len(name) // 64
    self._nodes += len(value) if isinstance(value, set) else 0
    if self._nodes > _MAX_NODES or depth > _MAX_DEPTH:
      raise errors.UserError(
          f"the file holds more than {_MAX_NODES} values, or objects that"
          f" contain themselves or are nested deeper than {_MAX_DEPTH}; save a"
          " plain state dict instead"
      )
    if isinstance(value, _LEAVES):
      return self._leaf(value, name, out)
    if isinstance(value, unpickle.Object):
      return self._object(value, name, out, depth + 1)
    if isinstance(value, set):
      return sorted(map(str, value))
    if isinstance(value, (dict, list, tuple)):
      items = value.items() if isinstance(value, dict) else enumerate(value)
      kept = [
          (k, rest) for k, v in items
          if (rest := self._walk(v, self._join(name, k), out, depth + 1))
          is not _GONE
      ]
      if value and not kept:
        return _GONE
      return dict(kept) if isinstance(value, dict) else [v for _, v in kept]
    if isinstance(value, unpickle.Global):
      return value.name
    if isinstance(value, np.generic):
      return value.item()
    return "a storage" if isinstance(value, torch_files.Storage) else value

  def _leaf(self, value: Any, name: str, out: Tensors | None) -> Any:
    if isinstance(value, unpickle.Array):
      value = value.value
      unpickle.require(value is not None, "an array has no numbers")
    is_tensor = isinstance(value, torch_files.Tensor)
    if out is None:
      return f"{value.dtype} {value.size if is_tensor else value.shape}"
    where = unpickle.shown(name)
    unpickle.require(name not in out, f"two tensors have the name {where}")
    out[name] = torch_files.as_array(value, name) if is_tensor else value
    return _GONE

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
      unpickle.require(type(part) is dict, f"{kind} is no dict")
      for key, child in part.items():
        if child is not None:
          self._walk(child, self._join(name, key), out, depth)
    return _GONE if name else described

  def _join(self, name: str, key: Any) -> str:
    joined = f"{name}{self._separator}{key}" if name else str(key)
    unpickle.require(len(joined) <= _MAX_NAME, "a tensor's name is too long")
    return joined


def groups_of(
    tree: Any, separator: str = "."
) -> tuple[dict[str, Tensors], dict[str, Any]]:
  """Splits a checkpoint into groups of tensors and plain values.

  Each entry of the outermost dict that holds tensors is a group; tensors that
  are entries themselves are the group '', and so is a tree that is no dict.

  Args:
    tree: of dicts, lists, objects, tensors and plain values.
    separator: between the parts of a name.

  Returns:
    groups: {group: {name: array}}.
    metadata: the outermost dict without its tensors.

  Raises:
    UserError: as `Walker.split`, or there is no tensor at all.
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
    twice = name in metadata or tensors and groups.get(name)
    where = unpickle.shown(name)
    unpickle.require(not twice, f"the file has two entries {where}")
    metadata[name] = rest
    if tensors:
      groups[name] = tensors
  groups = {name: group for name, group in groups.items() if group}
  if not groups:
    raise errors.UserError(f"the file holds no tensors (only {_held(tree)})")
  return groups, {k: v for k, v in metadata.items() if v is not None}


def network_of(tree: Any) -> tuple[dict[str, Tensors], dict[str, Any]]:
  """Splits an EDM pickle's averaged network, or else the trained one.

  Args:
    tree: of the pickle.

  Returns:
    groups: {'ema': {dotted name: array}}, or 'net'; parameters and buffers,
      in the dtype they were saved in.
    metadata: of the network class_name, init_args and init_kwargs (its
      constructor's arguments) and attributes (its plain attributes); modules,
      {dotted name: the same three of each part}; and the file's other entries
      under their own names, described.

  Raises:
    UserError: as `Walker.split`, or a pickle without a network.
  """
  entries = tree if type(tree) is dict else {}
  found = next((name for name in ("ema", "net") if name in entries), None)
  network, walker = entries.get(found), Walker()
  tensors, rest = walker.split(network)
  if not tensors:
    raise errors.UserError(
        f"the pickle holds {_held(tree)}, expected a network with tensors under"
        " 'ema' or 'net'; give a network snapshot of EDM or EDM2"
    )
  metadata = {str(k): walker.plain(v) for k, v in entries.items() if k != found}
  if isinstance(network, unpickle.Object):
    attributes = {
        name: walker.plain(value)
        for name, value in network.state.items()
        if not str(name).startswith("_")
        and not isinstance(value, unpickle.Object)
    }
    metadata |= rest | dict(attributes=attributes, modules=walker.modules)
  return {found: tensors}, metadata


def _held(tree: Any) -> str:
  some = list(tree)[:20] if type(tree) is dict else [tree]
  return ", ".join(map(unpickle.shown, some))[:400]
