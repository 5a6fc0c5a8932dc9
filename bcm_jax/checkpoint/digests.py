"""The leaves of a checkpoint: paths, host copies, digests, comparison.

The manifest is a JSON record that tells path, dtype, shape and SHA-256 of
every leaf, and its own digest. Nothing here touches a file.
"""

from collections.abc import Iterator
from concurrent import futures
import hashlib
import json
from typing import Any

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.training import multihost

FORMAT = 1

Path = tuple[str, ...]


class Damage(Exception):
  """A step that cannot be trusted; the message is the reason."""


def flatten(tree: Any) -> dict[Path, Any]:
  """Flattens to {path: leaf}; None and {} count as leaves."""
  return dict(_walk(serialization.to_state_dict(tree), ()))


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
  if isinstance(node, dict) and (node or not path):
    for key, child in node.items():
      yield from _walk(child, (*path, key))
  elif not path:
    raise TypeError(f"a state must be a container, got {type(node).__name__}")
  else:
    yield path, node


def unflatten(leaves: dict[Path, Any]) -> dict[str, Any]:
  """Turns {path: leaf} to nested dicts, the inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


def to_host(path: Path, leaf: Any) -> Any:
  """Returns a C-ordered host copy of the global array; None and {} as is."""
  if leaf is None or isinstance(leaf, dict):
    return leaf
  if isinstance(leaf, jax.Array):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise TypeError(
          f"{'/'.join(path)}: typed PRNG keys are not saved; derive keys from "
          "seed and step")
  host = multihost.to_host(leaf)
  if host.dtype.kind in "OUSMm":
    raise TypeError(f"{'/'.join(path)}: expected an array of numbers, got "
                    f"{type(leaf).__name__} of dtype {host.dtype}")
  return host


def is_stored(leaf: Any) -> bool:
  """Whether Orbax holds this leaf; the rest lives in the manifest alone."""
  return isinstance(leaf, np.ndarray) and leaf.size > 0


def _digest(array: np.ndarray) -> str:
  head = f"{array.dtype.name}{list(array.shape)}:".encode()
  digest = hashlib.sha256(head)
  # A byte view: hashlib takes no bfloat16 buffer, and tobytes would copy.
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _describe(path: Path, leaf: Any) -> dict[str, Any]:
  """Manifest entry of a leaf."""
  if not isinstance(leaf, np.ndarray):
    return {"path": list(path), "kind": "none" if leaf is None else "empty"}
  return {"path": list(path), "kind": "array", "dtype": leaf.dtype.name,
          "shape": list(leaf.shape), "sha256": _digest(leaf)}


def make_record(
    step: int, leaves: dict[Path, Any], meta: dict[str, Any]
) -> dict[str, Any]:
  """Returns the JSON record of a step, with its own digest.

  Raises:
    TypeError: meta is not made of JSON values.
    ValueError: two leaves would share a file name.
  """
  names = {".".join(path) for path in leaves}
  if len(names) < len(leaves):
    raise ValueError("two leaves have the same dotted name, which Orbax "
                     "would mix up; rename a key that holds a dot")
  with futures.ThreadPoolExecutor() as pool:  # hashlib releases the GIL.
    described = list(pool.map(_describe, leaves.keys(), leaves.values()))
  record = {
      "format": FORMAT, "step": step, "meta": meta, "leaves": described,
  }
  record = json.loads(json.dumps(record))
  return {**record, "sha256": json_digest(record)}


def tree_digest(tree: Any) -> str:
  """Twelve hex digits that name all tensors of a tree."""
  leaves = {path: to_host(path, leaf) for path, leaf in flatten(tree).items()}
  return json_digest(make_record(0, leaves, {}))[:12]


def json_digest(record: dict[str, Any]) -> str:
  """SHA-256 of a record, whatever the order of its keys."""
  text = json.dumps(record, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def verified(entry: dict[str, Any], tree: Any, path: Path) -> Any:
  """Returns the leaf of a manifest entry from the tree Orbax read.

  Raises:
    Damage: the leaf is not there or its digest differs.
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
    want: dict[Path, Any], have: dict[Path, Any]
) -> list[str]:
  """Says leaf by leaf how a checkpoint differs from a template, if at all."""
  wrong = [f"{'/'.join(p)} is missing" for p in want if p not in have]
  wrong += [f"{'/'.join(p)} is extra" for p in have if p not in want]
  for path, leaf in want.items():
    if path in have and _kind(leaf) != _kind(have[path]):
      wrong.append(f"{'/'.join(path)} is {_kind(have[path])}, expected "
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
  """Puts a host array where the template's leaf lives."""
  if not isinstance(host, np.ndarray):
    return host
  if isinstance(template, (bool, int, float)):
    return type(template)(host)
  if isinstance(template, (np.ndarray, np.generic)):
    return host
  sharding = getattr(template, "sharding", None)
  # An uncommitted array must stay so: jit compiles anew for a committed one.
  if sharding is None or not getattr(template, "committed", True):
    return jnp.array(host)
  return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index])
