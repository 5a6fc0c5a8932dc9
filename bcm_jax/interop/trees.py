"""Trees of a weight file, parted into flat tensors and plain values."""

from typing import Any

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop.numpy_pickle import Array
from bcm_jax.interop.pickle_machine import Known
from bcm_jax.interop.pickle_machine import shown
from bcm_jax.interop.torch_pickle import as_array
from bcm_jax.interop.torch_pickle import Module
from bcm_jax.interop.torch_pickle import Storage
from bcm_jax.interop.torch_pickle import Tensor

Tensors = dict[str, np.ndarray]

# A few bytes can describe a tree without end, or with endless names.
_MAX_DEPTH = 100
_MAX_NODES = 1_000_000
_MAX_NAME = 4096

_CONTAINERS = (dict, list, tuple, set, frozenset, Module)
_LEAVES = (Tensor, Array, np.ndarray)

# What is left of a subtree that held tensors alone.
_GONE = object()


class Walker:
  """Parts trees; one walker a file, since it bounds the work.

  Attributes:
    separator: between the parts of a name.
    modules: what is known of each module that was met, by dotted name.
  """

  def __init__(self, separator: str = "."):
    self.separator = separator
    self.modules: dict[str, dict[str, Any]] = {}
    self._nodes = 0
    self._depth = 0

  def part(self, tree: Any) -> tuple[Tensors, Any]:
    """Returns a subtree's tensors and what is left of it.

    Args:
      tree: of dicts, lists, modules, tensors and plain values.

    Returns:
      tensors: by their names, joined by the separator.
      rest: the tree without its tensors; None if nothing is left.

    Raises:
      UserError: two tensors of one name, one outside of its storage, a tree
        that contains itself or is too large.
    """
    out: Tensors = {}
    rest = self._walk(tree, "", out)
    return out, None if rest is _GONE else rest

  def plain(self, tree: Any) -> Any:
    """Returns a tree with tensors and modules described in words."""
    return self._walk(tree, "", None)

  def describe(self, module: Module) -> dict[str, Any]:
    """Returns class_name, and init_args and init_kwargs if they were kept."""
    found = dict(class_name=module.class_name)
    for key in ("init_args", "init_kwargs"):
      if module.state.get("_" + key) is not None:
        found[key] = self.plain(module.state["_" + key])
    return found

  def _walk(self, value: Any, name: str, out: Tensors | None) -> Any:
    self._nodes += 1
    if self._nodes > _MAX_NODES:
      raise UserError(
          f"the file holds more than {_MAX_NODES} values; save a plain state"
          " dict instead"
      )
    if isinstance(value, _LEAVES):
      return self._leaf(value, name, out)
    if isinstance(value, _CONTAINERS):
      self._depth += 1
      if self._depth > _MAX_DEPTH:
        raise UserError(
            "the file's objects contain themselves or are nested deeper than"
            f" {_MAX_DEPTH}; save a plain state dict instead"
        )
      rest = self._container(value, name, out)
      self._depth -= 1
      return rest
    if isinstance(value, Known):
      return value.name
    if isinstance(value, np.generic):
      return value.item()
    return "a storage" if isinstance(value, Storage) else value

  def _leaf(self, value: Any, name: str, out: Tensors | None) -> Any:
    if isinstance(value, Array):
      value = value.value
      if value is None:
        raise UserError(f"array {shown(name)} has no numbers; refused")
    if out is None:
      shape = value.size if isinstance(value, Tensor) else value.shape
      return f"{value.dtype} {shape}"
    if name in out:
      raise UserError(
          f"two tensors have the name {shown(name)}; rename one of them"
      )
    array = as_array(value, name) if isinstance(value, Tensor) else value
    out[name] = array
    return _GONE

  def _container(self, value: Any, name: str, out: Tensors | None) -> Any:
    if isinstance(value, Module):
      return self._module(value, name, out)
    if isinstance(value, (set, frozenset)):
      return sorted(map(str, value))
    if isinstance(value, dict):
      rest = {
          k: self._walk(v, self._join(name, k), out) for k, v in value.items()
      }
      rest = {k: v for k, v in rest.items() if v is not _GONE}
    else:
      rest = [
          self._walk(v, self._join(name, i), out) for i, v in enumerate(value)
      ]
      rest = [v for v in rest if v is not _GONE]
    return rest if rest or not value else _GONE

  def _module(self, module: Module, name: str, out: Tensors | None) -> Any:
    described = self.describe(module)
    if out is None:
      return described
    self.modules[name] = described
    for kind in ("_parameters", "_buffers", "_modules"):
      for key, value in module.part(kind).items():
        if value is not None:
          self._walk(value, self._join(name, key), out)
    return described if not name else _GONE

  def _join(self, name: str, key: Any) -> str:
    joined = f"{name}{self.separator}{key}" if name else str(key)
    if len(joined) > _MAX_NAME:
      raise UserError(f"a tensor's name has more than {_MAX_NAME} characters")
    return joined


def groups_of(
    tree: Any, separator: str = "."
) -> tuple[dict[str, Tensors], dict[str, Any]]:
  """Returns a checkpoint's groups of tensors and its plain values.

  Each entry of the outermost dict that holds tensors is a group; tensors that
  are entries themselves make up the group ''. A tree that is no dict is the
  group ''.

  Args:
    tree: of dicts, lists, modules, tensors and plain values.
    separator: between the parts of a name.

  Returns:
    groups: {group: {name: array}}.
    metadata: the outermost dict without its tensors.

  Raises:
    UserError: as `Walker.part`, or there is no tensor at all.
  """
  walker = Walker(separator)
  if type(tree) is not dict:
    tensors, rest = walker.part(tree)
    groups, metadata = {"": tensors}, {"": rest}
  else:
    groups, metadata = _entries(tree, walker)
  groups = {name: group for name, group in groups.items() if group}
  if not groups:
    held = ", ".join(map(shown, tree)) if type(tree) is dict else shown(tree)
    raise UserError(f"the file holds no tensors (it holds: {held[:400]})")
  return groups, {k: v for k, v in metadata.items() if v is not None}


def _entries(
    tree: dict[Any, Any], walker: Walker
) -> tuple[dict[str, Tensors], dict[str, Any]]:
  loose = {k: v for k, v in tree.items() if isinstance(v, _LEAVES)}
  groups, metadata = {"": walker.part(loose)[0]}, {}
  for key, value in tree.items():
    if key in loose:
      continue
    name = str(key)
    tensors, rest = walker.part(value)
    if name in metadata or (tensors and groups.get(name)):
      raise UserError(f"the file has two entries {shown(name)}; rename one")
    metadata[name] = rest
    if tensors:
      groups[name] = tensors
  return groups, metadata
