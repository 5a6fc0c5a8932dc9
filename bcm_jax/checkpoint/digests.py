"""Leaves of a checkpoint: paths, host copies, digests, comparison.

The manifest is a JSON record with the path, dtype, shape and SHA-256 of every
leaf and with a digest of the record itself. This module does no file I/O.
"""

from concurrent import futures
import json
from typing import Any

from flax import serialization
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.training import multihost
from bcm_jax.utils import hashing

FORMAT = 1

Path = tuple[str, ...]


class Damage(Exception):
  """Damage of a checkpoint; the message is the reason."""


def flatten(tree: Any) -> dict[Path, Any]:
  """Flattens a tree to {path: leaf}; None and {} count as leaves.

  Raises:
    TypeError: the tree is a single leaf.
  """
  tree = serialization.to_state_dict(tree)
  if not isinstance(tree, dict):
    raise TypeError(
        f"state: got {type(tree).__name__}, expected a container of arrays; "
        "wrap it in a dict"
    )
  flat = traverse_util.flatten_dict(tree, keep_empty_nodes=True)
  return {
      path: {} if leaf is traverse_util.empty_node else leaf
      for path, leaf in flat.items()
  }


def to_host(path: Path, leaf: Any) -> Any:
  """Returns a C-ordered host copy of a global array; None and {} unchanged.

  Raises:
    TypeError: the leaf is not an array of numbers.
  """
  if leaf is None or isinstance(leaf, dict):
    return leaf
  if isinstance(leaf, jax.Array):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise TypeError(
          f"{'/'.join(path)}: got a typed PRNG key, expected an array of "
          "numbers; derive keys from seed and step")
  host = multihost.to_host(leaf)
  if host.dtype.kind in "OUSMm":
    raise TypeError(
        f"{'/'.join(path)}: got {type(leaf).__name__} of dtype {host.dtype}, "
        "expected an array of numbers; remove it from the state"
    )
  return host


def _digest(array: np.ndarray) -> str:
  return hashing.arrays_digest(
      [(f"{array.dtype.name}{list(array.shape)}:", array)]
  )


def _describe(path: Path, leaf: Any) -> dict[str, Any]:
  """Returns the manifest entry of a leaf."""
  if not isinstance(leaf, np.ndarray):
    return {"path": list(path), "kind": "none" if leaf is None else "empty"}
  return {"path": list(path), "kind": "array", "dtype": leaf.dtype.name,
          "shape": list(leaf.shape), "sha256": _digest(leaf)}


def make_record(
    step: int, leaves: dict[Path, Any], meta: dict[str, Any]
) -> dict[str, Any]:
  """Returns the JSON record of a step, including its digest.

  Args:
    step: step number.
    leaves: path -> host leaf, see `to_host`.
    meta: metadata of the caller, JSON values.

  Raises:
    TypeError: meta has values that are not JSON.
    ValueError: two leaves would share a file name.
  """
  names = {".".join(path) for path in leaves}
  if len(names) < len(leaves):
    raise ValueError(
        "state: got two leaves with the same dotted name, which Orbax cannot "
        "distinguish, expected unique names; rename a key that contains a dot"
    )
  with futures.ThreadPoolExecutor() as pool:  # hashlib releases the GIL.
    described = list(pool.map(_describe, leaves.keys(), leaves.values()))
  record = {
      "format": FORMAT, "step": step, "meta": meta, "leaves": described,
  }
  record = json.loads(json.dumps(record))
  return {**record, "sha256": hashing.json_digest(record)}


def tree_digest(tree: Any) -> str:
  """Returns a digest of all tensors of a tree, twelve hex digits."""
  leaves = {path: to_host(path, leaf) for path, leaf in flatten(tree).items()}
  return hashing.json_digest(make_record(0, leaves, {}))[:12]


def verified(entry: dict[str, Any], tree: Any, path: Path) -> Any:
  """Returns a verified leaf.

  Args:
    entry: entry of the manifest.
    tree: nested dicts of arrays, as Orbax restores them.
    path: path of the leaf.

  Raises:
    Damage: the leaf is missing or its digest differs.
  """
  if entry["kind"] != "array":
    return None if entry["kind"] == "none" else {}
  if 0 in entry["shape"]:
    return np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
  name = "/".join(path)
  for key in path:
    if not isinstance(tree, dict) or key not in tree:
      raise Damage(f"state: leaf {name} is missing")
    tree = tree[key]
  array = np.asarray(tree)
  if _digest(array) != entry["sha256"]:
    raise Damage(f"state: digest of leaf {name} differs")
  return array


def differences(
    expected: dict[Path, Any], leaves: dict[Path, Any]
) -> list[str]:
  """Returns a description of each leaf that differs from the template.

  Args:
    expected: path -> leaf of the template.
    leaves: path -> leaf of the checkpoint.
  """
  wrong = [f"{'/'.join(p)} is missing" for p in expected if p not in leaves]
  wrong += [f"{'/'.join(p)} is extra" for p in leaves if p not in expected]
  for path, leaf in expected.items():
    if path in leaves and _kind(leaf) != _kind(leaves[path]):
      wrong.append(f"{'/'.join(path)} is {_kind(leaves[path])}, expected "
                   f"{_kind(leaf)}")
  return wrong


def _kind(leaf: Any) -> str:
  if leaf is None:
    return "None"
  if isinstance(leaf, dict):
    return "empty"
  if not hasattr(leaf, "dtype"):
    leaf = np.asarray(leaf)
  return f"{leaf.dtype.name}{list(leaf.shape)}"


def place(template: Any, host: Any) -> Any:
  """Places a host leaf with the type and sharding of the template's leaf."""
  if not isinstance(host, np.ndarray):
    return host
  if isinstance(template, (bool, int, float)):
    return type(template)(host)
  if isinstance(template, (np.ndarray, np.generic)):
    return host
  sharding = getattr(template, "sharding", None)
  # An uncommitted array stays uncommitted: jit recompiles for a committed one.
  if sharding is None or not getattr(template, "committed", True):
    return jnp.array(host)
  return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index])
