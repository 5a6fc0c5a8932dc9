"""Conversion of published generator weights to Flax parameters, and back.

A family is a module of `interop.families` with NAME, NETWORK, PREFIXES, MARKER,
ASSUMED, `entry` and `recognize`. Optional functions are `constants`, for
buffers that are determined by the network attributes, and `join` and `split`,
for Flax parameters that correspond to several tensors. Published names are
derived from the Flax parameter tree, so that both directions use one table and
check that it is complete.
"""

from collections.abc import Mapping
import functools
import inspect
import re
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

# (part of a tensor name, config keys that determine its existence and shape).
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
  """Returns {path: shape} of all parameters, without allocating them."""
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
  """Returns whether a function has the parameter image_size."""
  return "image_size" in inspect.signature(function).parameters


def entries(
    family: ModuleType, network, image_size: int
) -> list[tuple[layouts.Entry, tuple[int, ...]]]:
  """Returns (entry, Flax shape) of every parameter of a network."""
  options = {"image_size": image_size} if _takes_size(family.entry) else {}
  return [
      (family.entry(network, path, shape, **options), shape)
      for path, shape in shapes(network, image_size).items()
  ]


def strip(family: ModuleType, tensors: Tensors) -> Tensors:
  """Removes name prefixes: 'module.' and the prefixes of the family."""
  for prefix in ("module.", *family.PREFIXES):
    if prefix and tensors and all(n.startswith(prefix) for n in tensors):
      tensors = {n.removeprefix(prefix): v for n, v in tensors.items()}
  return tensors


def read_params(
    family: ModuleType, network, image_size: int, tensors: Tensors
) -> dict[str, Any]:
  """Converts published tensors to Flax parameters.

  Args:
    family: family of the tensors.
    network: Linen module of the parameters.
    image_size: image height and width in pixels.
    tensors: name without prefixes -> array; the dtype is kept.

  Returns:
    The parameter tree. Every tensor is used exactly once.

  Raises:
    UserError: tensors are missing, unexpected, or of another shape, or buffers
      have other values; the message names tensors and config keys.
  """
  if hasattr(family, "join"):
    tensors = family.join(tensors)
  table = entries(family, network, image_size)
  constants = _constants(family, network, [e.name for e, _ in table])
  _check_names({e.name for e, _ in table} | constants.keys(), tensors)
  for name, value in constants.items():
    if not np.allclose(tensors[name], value, atol=1e-6):
      raise errors.UserError(
          f"model.resample_filter: got {network.resample_filter}, expected the "
          f"filter in tensor {name!r}; change it"
      )
  flat = {}
  for entry, shape in table:
    value = tensors[entry.name]
    expected = np.shape(entry.layout.to_torch(np.broadcast_to(0, shape)))
    try:
      converted = entry.layout.to_flax(value)
    except (ValueError, IndexError):
      converted = None
    if converted is None or converted.shape != shape:
      raise errors.UserError(
          f"tensor {entry.name!r}: got shape {value.shape}, expected "
          f"{expected}; change {_explain(entry.name)}"
      )
    flat[entry.path] = np.array(converted, order="C")
  return traverse_util.unflatten_dict(flat)


def write_tensors(
    family: ModuleType, network, image_size: int, params: Mapping[str, Any]
) -> Tensors:
  """Converts Flax parameters to tensors under their published names.

  Args:
    family: family of the tensors.
    network: Linen module of the parameters.
    image_size: image height and width in pixels.
    params: parameter tree.

  Returns:
    Name with prefix -> array.

  Raises:
    UserError: the parameters belong to another network.
  """
  flat = traverse_util.flatten_dict(params)
  table = entries(family, network, image_size)
  _check_names(
      {"/".join(e.path) for e, _ in table}, {"/".join(p): v
                                             for p, v in flat.items()}
  )
  tensors = {
      e.name: np.array(e.layout.to_torch(np.asarray(flat[e.path])), order="C")
      for e, _ in table
  }
  tensors |= _constants(family, network, list(tensors))
  if hasattr(family, "split"):
    tensors = family.split(tensors)
  return {family.PREFIXES[0] + n: v for n, v in tensors.items()}


def _constants(family: ModuleType, network, names: list[str]) -> Tensors:
  """Returns the buffers that are determined by the network attributes."""
  if not hasattr(family, "constants"):
    return {}
  return family.constants(network, names)


def _explain(name: str) -> str:
  """Returns the config keys that determine a tensor."""
  return next(key for part, key in _EXPLAINED if part in name)


def _check_names(expected, tensors) -> None:
  """Raises UserError for missing or unexpected names of tensors."""
  missing = sorted(expected - tensors.keys())
  unexpected = sorted(tensors.keys() - expected)
  if not missing and not unexpected:
    return
  problems = []
  for names, problem in ((missing, "missing"), (unexpected, "unexpected")):
    if names:
      shown = ", ".join(f"{n} ({_explain(n)})" for n in names[:8])
      more = f" and {len(names) - 8} more" if len(names) > 8 else ""
      problems.append(f"{len(names)} tensors {problem}: {shown}{more}")
  raise errors.UserError(
      "tensors: expected those of the configured network; "
      + "; ".join(problems) + "; change the config keys in parentheses"
  )


# Parts of names that torch.compile, DDP, FSDP and checkpointing insert.
_WRAPPERS = (
    "_orig_mod.", "module.", "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)


def unwrap(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Removes the parts of names that wrappers of torch insert.

  Returns:
    The same tensors; with their own names if some would get the same name.
  """
  wrapped = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, _WRAPPERS))})+")
  renamed = {wrapped.sub("", name): v for name, v in tensors.items()}
  return renamed if len(renamed) == len(tensors) else dict(tensors)


def prefixes(tensors: Mapping[str, Any]) -> list[str]:
  """Returns what precedes a family's names, one prefix per network."""
  markers = {family.MARKER for family in FAMILIES.values()}
  return sorted({
      name.removesuffix(marker)
      for name in tensors for marker in markers
      if name.endswith(marker) and name.removesuffix(marker)[-1:] in (
          "", ".", "/"
      )
  })


def only_network(
    tensors: Mapping[str, Any], prefix: str | None = None
) -> Tensors:
  """Selects the tensors of one network and removes their prefix.

  Args:
    tensors: name in the file -> array.
    prefix: prefix of the network's names; None finds it, and removes it if all
      names have it.

  Raises:
    UserError: no name has the prefix; or prefix is None, and the names of
      several networks, or of a network and of others, have different prefixes.
  """
  unwrapped = unwrap(tensors)
  if prefix is not None:
    for named in (tensors, unwrapped):
      found = {
          n.removeprefix(prefix): v
          for n, v in named.items() if n.startswith(prefix)
      }
      if found:
        return unwrap(found)
    raise errors.UserError(
        f"--prefix: got {prefix!r}, expected the beginning of names such as "
        f"{', '.join(sorted(tensors)[:3])}; correct it"
    )
  known = prefixes(unwrapped)
  others = {
      n for n in unwrapped if len(known) == 1 and not n.startswith(known[0])
  }
  if len(known) > 1 or others:
    shown = ", ".join(repr(p) for p in known[:8])
    also = f" besides {', '.join(sorted(others)[:3])}" if others else ""
    raise errors.UserError(
        f"--prefix: got tensors of networks with the prefix {shown}{also}, "
        "expected one network; choose it, such as "
        f"--prefix={known[0] or 'NAME.'}"
    )
  if not known:
    return unwrapped
  return {n.removeprefix(known[0]): v for n, v in unwrapped.items()}


def recognize(
    tensors: Tensors, kind: str = "auto", metadata: Mapping[str, Any] | None
    = None, prefix: str | None = None,
) -> tuple[ModuleType, Tensors, dict[str, Any]]:
  """Detects the family and the network attributes of published tensors.

  Args:
    tensors: name in the file -> array.
    kind: name of a family, or 'auto' to try all families.
    metadata: metadata of the file.
    prefix: see `only_network`.

  Returns:
    (family, tensors without prefixes, network attributes and image_size).

  Raises:
    UserError: the kind is unknown, or no family matches the tensors; as
      `only_network`; or the family does not determine the image size.
  """
  if kind != "auto" and kind not in FAMILIES:
    raise errors.unknown_name("--kind", kind, ["auto", *FAMILIES])
  families = FAMILIES.values() if kind == "auto" else [FAMILIES[kind]]
  selected = only_network(tensors, prefix)
  for family in families:
    stripped = strip(family, selected)
    try:
      attributes = family.recognize(stripped, dict(metadata or {}))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
      raise errors.UserError(
          f"tensors: got incomplete weights of kind {family.NAME!r}, expected "
          f"{e}; use the original file"
      ) from e
    if attributes is not None:
      given = (metadata or {}).get("image_size")
      attributes["image_size"] = _image_size(family, attributes, given)
      _levels_to_pixels(attributes)
      return family, stripped, attributes
  shown = ", ".join(sorted(tensors)[:4])
  raise errors.UserError(
      f"tensors: got {shown} ({len(tensors)} in total), expected a network of "
      f"kind {', '.join(f.NAME for f in families)}; correct SOURCE or --kind"
  )


def _image_size(family, attributes, given: int | None) -> int:
  """Returns the image size in pixels, from the user or the tensors.

  Raises:
    UserError: the user's differs from that of the tensors, or neither is known.
  """
  found = attributes.get("image_size")
  if given is None:
    given = found
  if given is None:
    raise errors.UserError(
        "--image-size: got none, expected the pixels per side: the tensors of "
        f"kind {family.NAME!r} with channel_mult="
        f"{attributes['channel_mult']} do not determine it; give "
        "--image-size=N"
    )
  if found not in (None, given):
    raise errors.UserError(
        f"--image-size: got {given}, expected {found} as in the names of the "
        "tensors; omit it"
    )
  return given


def _levels_to_pixels(attributes: dict[str, Any]) -> None:
  """Replaces attention_levels by attention_resolutions, in place."""
  levels = attributes.pop("attention_levels", None)
  if levels is not None:
    attributes["attention_resolutions"] = tuple(
        attributes["image_size"] >> level for level in levels
    )
