"""Config sections under which published networks are sampled."""

from collections.abc import Mapping
import re
from typing import Any

from bcm_jax import errors

_DENOISER = {
    "method": {"name": "edm"}, "sample": {"sampler": "heun"},
    "eval": {"samplers": ("heun",)},
}
# Method -> sections. `sid` (Zhou et al., 2024) generates in one jump from
# sigma 2.5, as DMD2 does from sigma_max; ECT evaluates with the preconditioning
# of consistency models.
METHODS = {
    "bcm": {"method": {"name": "bcm"}},
    "ctm": {"method": {"name": "ctm"}},
    "edm": _DENOISER,
    "ct": {"method": {"name": "ct"}},
    "cd": {"method": {"name": "cd"}},
    "ict": {"method": {"name": "ict"}},
    "ect": {"method": {"name": "ect", "preconditioning": "cm"}},
    # Without the pairs, which only training needs.
    "dmd": {"method": {"name": "dmd", "regression_weight": 0.0}},
    "dmd2": {"method": {"name": "dmd2"}},
    "sid": {"method": {"name": "dmd2", "sigma_max": 2.5}},
}
# Methods whose published networks of kind openai normalize q, k and v.
QKV_NORM = {"bcm": True, "ict": True}
# Method of networks with an end level, by model.end_branch.
_TWO_TIME = {"align": "bcm", "blocks": "ctm"}
# Classes of EDM's pickles that tell the method.
_CLASSES = {
    "EDMLoss": "edm", "EDM2Loss": "edm", "VPLoss": "edm", "VELoss": "edm",
    "ECMLoss": "ect", "ECMPrecond": "ect",
}
# Families whose published networks are all consistency models of one sampler.
_CONSISTENCY = ("openai", "jcm")


def method_of(
    family: str,
    model: Mapping[str, Any],
    name: str | None,
    source: str,
    metadata: Mapping[str, Any],
) -> tuple[str, str]:
  """Returns the method of a converted network, and how it is known.

  A one-time network and its tensors do not determine whether it is a denoiser
  or a generator that was distilled from one.

  Args:
    family: name of the family.
    model: config section model.
    name: key of METHODS from the user, or None.
    source: name of the file.
    metadata: metadata of the file.

  Raises:
    UserError: an unknown method, one of other networks, or an unknown one.
  """
  if name is not None and name not in METHODS:
    raise errors.unknown_name("--as", name, METHODS)
  if model.get("two_time"):
    found = _TWO_TIME[model["end_branch"]]
    if name not in (None, found):
      raise errors.UserError(
          f"--as: got {name}, expected {found}, since the network has an end "
          "level; omit it"
      )
    return found, "from the tensors"
  if name in _TWO_TIME.values():
    raise errors.UserError(
        f"--as: got {name}, expected a method of one noise level "
        f"({', '.join(_one_time())}), since the network has no end level; "
        "convert it as one of them and train from it (training.init_from)"
    )
  if name is not None:
    return name, "from --as"
  loss = metadata.get("loss_fn")
  classes = (
      loss.get("class_name") if isinstance(loss, Mapping) else None,
      metadata.get("class_name"),
  )
  found = {_CLASSES[c] for c in classes if c in _CLASSES}
  if len(found) == 1:
    return found.pop(), "from the classes in the file"
  words = re.split(r"[^a-z0-9]+|(?<=edm)2", source.lower())
  found = {w for w in words if w in _one_time()}
  if len(found) == 1:
    return found.pop(), "from the file name"
  if family in _CONSISTENCY and not found:
    return "ict", "assumed; --as=METHOD changes it"
  raise errors.UserError(
      "--as: got none, expected the method of the network "
      f"({', '.join(_one_time())}): its tensors do not determine whether it is "
      "a denoiser or was distilled from one; write --as=edm for a diffusion "
      "model"
  )


def _one_time() -> list[str]:
  """Returns the methods of networks without an end level."""
  return [name for name in METHODS if name not in _TWO_TIME.values()]
