"""What a name in a config stands for: networks, methods, preconditionings."""

from collections.abc import Callable, Mapping
import types
from typing import Any, NamedTuple

import jax

from bcm_jax.diffusion import preconditioning
from bcm_jax.methods import bcm
from bcm_jax.methods import cd
from bcm_jax.methods import consistency
from bcm_jax.methods import ctm
from bcm_jax.methods import dmd
from bcm_jax.methods import edm
from bcm_jax.models import adm
from bcm_jax.models import edm2
from bcm_jax.models import song

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Model(NamedTuple):
  """A network by name.

  Attributes:
    cls: Linen module.
    noise: conditioning value of a noise level that it expects.
    preset: its options that differ from the class's defaults.
  """

  cls: type
  noise: Callable[[jax.Array], jax.Array]
  preset: Mapping[str, Any] = _NOTHING


class Method(NamedTuple):
  """A method by name.

  Attributes:
    cls: its class.
    preset: its options that differ from the class's defaults.
    preconditioning: the usual one.
    auxiliary: whether it trains networks besides the one that is sampled;
      section auxiliary_optimizer is their optimizer.
  """

  cls: type
  preset: Mapping[str, Any] = _NOTHING
  preconditioning: str = "cm"
  auxiliary: bool = False


MODELS = {
    "adm": Model(adm.ADM, preconditioning.adm_noise),
    "dhariwal": Model(adm.ADM, preconditioning.edm_noise, adm.DHARIWAL),
    "ddpmpp": Model(song.SongUNet, preconditioning.edm_noise),
    "ncsnpp": Model(song.SongUNet, preconditioning.edm_noise, song.NCSNPP),
    "edm2": Model(edm2.EDM2, preconditioning.edm_noise),
}

METHODS = {
    name: Method(consistency.ConsistencyTraining, preset)
    for name, preset in consistency.PRESETS.items()
} | {
    "bcm": Method(bcm.BidirectionalTraining, preconditioning="bcm"),
    "edm": Method(edm.Diffusion, preconditioning="edm"),
    "ctm": Method(
        ctm.TrajectoryDistillation, preconditioning="ctm", auxiliary=True
    ),
    "dmd": Method(
        dmd.DistributionMatching, dmd.DMD,
        "edm", auxiliary=True,
    ),
    "dmd2": Method(
        dmd.DistributionMatching, dmd.DMD2,
        "edm", auxiliary=True,
    ),
    "cd": Method(cd.ConsistencyDistillation, cd.PRESET),
}

# Methods that are nothing without method.teacher.
NEED_TEACHER = ("cd", "dmd", "dmd2")

PRECONDITIONINGS = {
    "edm": lambda m: preconditioning.EDM(m["sigma_data"]),
    "cm": lambda m: preconditioning.ConsistencyBoundary(
        m["sigma_data"], m["sigma_min"]
    ),
    "bcm": lambda m: preconditioning.Bidirectional(m["sigma_data"]),
    "ctm": lambda m: preconditioning.Trajectory(
        preconditioning.EDM(m["sigma_data"])
    ),
}
