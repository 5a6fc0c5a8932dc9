"""Weights of a published network into our parameter tree, and back.

A family is a module with NAME, NETWORK, PREFIXES, IMAGE_SIZE, `entry` and
`recognise`; `constants` where buffers follow from the attributes; `join` and
`split` where several of its tensors are one of ours. Names are made from our
tree, so that both directions use one table, and no tensor can be forgotten on
either side.
"""

from collections.abc import Mapping
import functools
import inspect
from types import ModuleType
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.interop import layouts
from bcm_jax.interop.families import edm2_names
from bcm_jax.interop.families import edm_adm_names
from bcm_jax.interop.families import edm_names
from bcm_jax.interop.families import jcm_names
from bcm_jax.interop.families import openai_names

Tensors = dict[str, np.ndarray]

FAMILIES = {
    f.NAME: f
    for f in (openai_names, edm_names, edm_adm_names, edm2_names, jcm_names)
}

# Part of a tensor's name -> what in the config decides that it exists.
_EXPLAINED = (
    ("label", "model.num_classes"),
    ("augment", "model.augment_dim"),
    ("_end", "model.two_time"),
    ("align", "model.end_branch='align'"),
    ("_s.", "model.end_branch='blocks'"),
    ("qkv", "model.attention_resolutions"),
    ("proj", "model.attention_resolutions"),
    ("norm2", "model.attention_resolutions"),
    ("NIN", "model.attention_resolutions"),
    ("AttnBlock", "model.attention_resolutions"),
    (".1.norm", "model.attention_resolutions"),
    ("aux_", "model.encoder and model.decoder"),
    ("freqs", "model.embedding='fourier'"),
    ("filter", "model.resample_filter"),
    ("logvar", "model.logvar_channels"),
    ("skip", "model.channel_mult"),
    ("", "model.num_res_blocks and model.channel_mult"),
)


@functools.cache
def shapes(network, image_size: int) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Path -> shape of every parameter; nothing is allocated."""
  channels = network.out_channels
  inputs = (
      jnp.zeros((1, image_size, image_size, channels)),
      jnp.zeros(1),
      jnp.zeros(1) if getattr(network, "two_time", False) else None,
      None if network.num_classes is None else jnp.zeros(1, jnp.int32),
  )
  tree = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))
  flat = traverse_util.flatten_dict(tree["params"])
  return {path: leaf.shape for path, leaf in flat.items()}


@functools.cache
def _takes_size(function) -> bool:
  return "image_size" in inspect.signature(function).parameters


def entries(
    family: ModuleType, network, image_size: int
) -> list[tuple[layouts.Entry, tuple[int, ...]]]:
  """(entry, our shape) of every parameter of a network."""
  extra = {"image_size": image_size} if _takes_size(family.entry) else {}
  return [
      (family.entry(network, path, shape, **extra), shape)
      for path, shape in shapes(network, image_size).items()
  ]


def strip(family: ModuleType, tensors: Tensors) -> Tensors:
  """Tensors without the prefixes of wrappers: 'module.' and the family's."""
  for prefix in ("module.", *family.PREFIXES):
    if prefix and tensors and all(n.startswith(prefix) for n in tensors):
      tensors = {n.removeprefix(prefix): v for n, v in tensors.items()}
  return tensors


def read_params(
    family: ModuleType, network, image_size: int, tensors: Tensors
) -> dict[str, Any]:
  """Our parameter tree; every tensor is used exactly once.

  Args:
    family: module that names the tensors.
    network: Linen module that they belong to.
    image_size: pixels a side.
    tensors: name -> array, without prefixes; kept in their own dtype.

  Raises:
    UserError: tensors missing, left over, of other shapes or of other
      constants than the network's; names all kinds and the config keys that
      explain them.
  """
  if hasattr(family, "join"):
    tensors = family.join(tensors)
  table = entries(family, network, image_size)
  constants = _constants(family, network, [e.name for e, _ in table])
  _check_names({e.name for e, _ in table} | constants.keys(), tensors)
  for name, value in constants.items():
    if not np.allclose(tensors[name], value, atol=1e-6):
      raise errors.UserError(
          f"tensor {name!r} holds another filter than "
          f"model.resample_filter={network.resample_filter}"
      )
  flat = {}
  for entry, shape in table:
    value = tensors[entry.name]
    expected = np.shape(entry.layout.theirs(np.broadcast_to(0, shape)))
    try:
      ours = entry.layout.ours(value)
    except (ValueError, IndexError):
      ours = None
    if ours is None or ours.shape != shape:
      raise errors.UserError(
          f"tensor {entry.name!r} has shape {value.shape}, but the network "
          f"wants {expected} ({_explain(entry.name)})"
      )
    flat[entry.path] = np.array(ours, order="C")
  return traverse_util.unflatten_dict(flat)


def write_tensors(
    family: ModuleType, network, image_size: int, params: Mapping[str, Any]
) -> Tensors:
  """The tensors of our parameters under their foreign names, with prefix.

  Raises:
    UserError: parameters of another network.
  """
  flat = traverse_util.flatten_dict(params)
  table = entries(family, network, image_size)
  _check_names(
      {"/".join(e.path) for e, _ in table}, {"/".join(p): v
                                             for p, v in flat.items()}
  )
  tensors = {
      e.name: np.array(e.layout.theirs(np.asarray(flat[e.path])), order="C")
      for e, _ in table
  }
  tensors |= _constants(family, network, list(tensors))
  if hasattr(family, "split"):
    tensors = family.split(tensors)
  return {family.PREFIXES[0] + n: v for n, v in tensors.items()}


def _constants(family: ModuleType, network, names: list[str]) -> Tensors:
  """Tensors that follow from the network's attributes alone."""
  if not hasattr(family, "constants"):
    return {}
  return family.constants(network, names)


def _explain(name: str) -> str:
  return next(key for part, key in _EXPLAINED if part in name)


def _check_names(expected, found) -> None:
  missing = sorted(expected - found.keys())
  extra = sorted(found.keys() - expected)
  if not missing and not extra:
    return
  parts = []
  for names, what in ((missing, "missing"), (extra, "left over")):
    if names:
      shown = ", ".join(f"{n} ({_explain(n)})" for n in names[:8])
      more = f" and {len(names) - 8} more" if len(names) > 8 else ""
      parts.append(f"{len(names)} tensors {what}: {shown}{more}")
  raise errors.UserError(
      "the file does not fit the network; " + "; ".join(parts)
  )


def recognise(
    tensors: Tensors, kind: str = "auto", metadata: Mapping[str, Any] | None
    = None,
) -> tuple[ModuleType, Tensors, dict[str, Any]]:
  """Finds the network that tensors belong to.

  Args:
    tensors: name -> array, as in the file.
    kind: name of a family, or 'auto' to try all.
    metadata: what the file says beside its tensors.

  Returns:
    (family, tensors without prefixes, attributes of the network and
    image_size).

  Raises:
    UserError: unknown kind, or no family knows these tensors.
  """
  if kind != "auto" and kind not in FAMILIES:
    raise errors.unknown_name("kind", kind, ["auto", *FAMILIES])
  families = FAMILIES.values() if kind == "auto" else [FAMILIES[kind]]
  for family in families:
    stripped = strip(family, tensors)
    try:
      found = family.recognise(stripped, dict(metadata or {}))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
      raise errors.UserError(
          f"the file looks like kind {family.NAME!r}, but lacks {e}"
      ) from e
    if found is not None:
      asked = (metadata or {}).get("image_size", family.IMAGE_SIZE)
      found.setdefault("image_size", asked)
      _levels_to_pixels(found)
      return family, stripped, found
  shown = ", ".join(sorted(tensors)[:4])
  raise errors.UserError(
      f"no known network among {', '.join(f.NAME for f in families)} has "
      f"tensors such as {shown} ({len(tensors)} in all)"
  )


def _levels_to_pixels(found: dict[str, Any]) -> None:
  levels = found.pop("attention_levels", None)
  if levels is not None:
    found["attention_resolutions"] = tuple(
        found["image_size"] >> level for level in levels
    )
