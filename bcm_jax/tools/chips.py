"""TPU chips that a config can be compiled for, with their published numbers.

Sources: Google Cloud's documentation, "TPU v4", "TPU v5e", "TPU v5p" and "TPU
v6e (Trillium)" (system architecture pages), recalled and not looked up again.
What a program may use of the memory is what the compiler says (libtpu 0.0.52
refuses a larger one by that number).
"""

import dataclasses

from bcm_jax import errors


@dataclasses.dataclass(frozen=True)
class Chip:
  """Numbers of a device as JAX sees it.

  Attributes:
    flops: bfloat16 operations a second, at peak.
    bandwidth: bytes a second from its memory.
    memory: bytes of it that a program may use.
    megacore: whether its two cores must be asked for as one device.
  """

  flops: float
  bandwidth: float
  memory: float
  megacore: bool = False


_GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 1.228e12, 30.75 * _GIB, megacore=True),
    "v5e": Chip(197e12, 0.819e12, 15.75 * _GIB),
    "v5p": Chip(459e12, 2.765e12, 95.73 * _GIB),
    "v6e": Chip(918e12, 1.640e12, 31.24 * _GIB),
}


def find(topology: str) -> Chip:
  """The chip of a topology such as 'v5e:16x16'.

  Raises:
    UserError: its name is not known.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    raise errors.unknown_name("TPU in --topology", name, CHIPS)
  return CHIPS[name]
