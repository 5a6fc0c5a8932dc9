"""Config sections under which published networks are sampled."""

from collections.abc import Mapping
from typing import Any

_CONSISTENCY = {"method": {"name": "ict"}}
_DENOISER = {
    "method": {"name": "edm"}, "sample": {"sampler": "heun"},
    "eval": {"samplers": ("heun",)},
}
# By family; of networks with one noise level.
_ONE_TIME = {
    "openai": _CONSISTENCY, "jcm": _CONSISTENCY, "edm-adm": _DENOISER,
    "edm-song": _DENOISER, "edm2": _DENOISER,
}
# By model.end_branch; of networks with an end level.
_TWO_TIME = {
    "align": {"method": {"name": "bcm"}}, "blocks": {"method": {"name": "ctm"}}
}


def of(family: str, model: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sections for a family's network, given its section model."""
  if model.get("two_time"):
    return dict(_TWO_TIME[model["end_branch"]])
  return dict(_ONE_TIME[family])
