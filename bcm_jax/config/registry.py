"""Registries: config name -> network or method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bcm_jax.diffusion import preconditioning
from bcm_jax.methods import base
from bcm_jax.methods import bcm
from bcm_jax.methods import cd
from bcm_jax.methods import consistency
from bcm_jax.methods import ctm
from bcm_jax.methods import dmd
from bcm_jax.methods import edm
from bcm_jax.models import adm
from bcm_jax.models import edm2
from bcm_jax.models import song


class Model(NamedTuple):
  """Registry entry of a network.

  Attributes:
    cls: Linen module.
    preset: options that differ from the defaults of cls.
    c_noise_scale: factor on the method's c_noise, to match the scale that the
      network's noise embedding expects.
  """

  cls: type
  preset: Mapping[str, Any] = base.NOTHING
  c_noise_scale: float = 1.0


class Method(NamedTuple):
  """Registry entry of a method.

  Attributes:
    cls: class of the method.
    preset: options, title and paper that differ from those of cls.
  """

  cls: type[base.Method]
  preset: base.Preset = base.Preset()

  @property
  def title(self) -> str:
    """Noun phrase for the trained network."""
    return self.preset.title or self.cls.title

  @property
  def paper(self) -> str:
    """Authors and year of the publication."""
    return self.preset.paper or self.cls.paper


MODELS = {
    "adm": Model(adm.ADM, c_noise_scale=preconditioning.ADM_SCALE),
    "dhariwal": Model(adm.ADM, adm.DHARIWAL),
    "ddpmpp": Model(song.SongUNet),
    "ncsnpp": Model(song.SongUNet, song.NCSNPP),
    "edm2": Model(edm2.EDM2),
}

METHODS = {
    "ct": Method(consistency.ConsistencyTraining, consistency.CT),
    "ict": Method(consistency.ConsistencyTraining, consistency.ICT),
    "ect": Method(consistency.ConsistencyTraining, consistency.ECT),
    "bcm": Method(bcm.BidirectionalTraining),
    "edm": Method(edm.Diffusion),
    "cd": Method(cd.ConsistencyDistillation, cd.CD),
    "ctm": Method(ctm.TrajectoryDistillation),
    "dmd": Method(dmd.DistributionMatching, dmd.DMD),
    "dmd2": Method(dmd.DistributionMatching, dmd.DMD2),
}


def methods_with(declaration: str) -> str:
  """Returns "method.name='a' or 'b'" for the methods with a property.

  Args:
    declaration: boolean class attribute of base.Method.
  """
  names = [k for k, v in METHODS.items() if getattr(v.cls, declaration)]
  return f"method.name={' or '.join(map(repr, names))}"
