#!/usr/bin/env python3
"""Table of TPU slices: hosts, chips, and their names in the clouds.

    python launch/accelerators.py            prints all slices
    python launch/accelerators.py v5e-16     prints one slice, by any name

Hosts and chips agree with libtpu for every topology
(tests/launch/test_accelerators.py); names do not determine the number of hosts.
Sources: documentation of Cloud TPU and GKE on machine types and topologies.
"""

import dataclasses
import difflib
import sys


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice: chips connected by the interconnect, and their hosts.

  Attributes:
    name: name in this package: generation and number of chips (of TensorCores
      for generations that count those).
    generation: generation in libtpu's spelling.
    topology: chips along each axis, in the format of GKE and libtpu.
    hosts: number of virtual machines, one process each.
    chips_per_host: chips per host.
    devices_per_chip: jax.devices() per chip.
    hbm_gib: memory per chip in GiB.
    gcloud: --accelerator-type of gcloud and --tpu-type of xpk; '' if the Cloud
      TPU API does not offer it.
    gke: node label cloud.google.com/gke-tpu-accelerator; '' if GKE does not
      offer it.
    gke_machine: --machine-type of a GKE node pool.
  """

  name: str
  generation: str
  topology: str
  hosts: int
  chips_per_host: int
  devices_per_chip: int
  hbm_gib: int
  gcloud: str
  gke: str
  gke_machine: str

  @property
  def chips(self) -> int:
    """Number of chips of the slice."""
    return self.hosts * self.chips_per_host

  @property
  def libtpu_topology(self) -> str:
    """Name for jax.experimental.topologies and --mode=compile."""
    return f"{self.generation}:{self.topology}"


# The number in the name counts TensorCores, two per chip.
_FLAT_BY_CORES = {
    8: ("2x2", 1, 4), 32: ("4x4", 4, 4), 128: ("8x8", 16, 4),
    512: ("16x16", 64, 4),
}
_CUBE_BY_CORES = {
    8: ("2x2x1", 1, 4), 16: ("2x2x2", 2, 4), 32: ("2x2x4", 4, 4),
    64: ("2x4x4", 8, 4), 128: ("4x4x4", 16, 4), 256: ("4x4x8", 32, 4),
    512: ("4x8x8", 64, 4),
}
# The number in the name counts chips. Slices of up to eight chips have one
# host, larger ones have hosts of four chips.
_FLAT_BY_CHIPS = {
    1: ("1x1", 1, 1), 4: ("2x2", 1, 4), 8: ("2x4", 1, 8), 16: ("4x4", 4, 4),
    32: ("4x8", 8, 4), 64: ("8x8", 16, 4), 128: ("8x16", 32, 4),
    256: ("16x16", 64, 4),
}
# GKE also has eight chips on two machines.
_ON_TWO_HOSTS = {"8-2hosts": ("2x4", 2, 4)}

# Generation, sizes, devices per chip, GiB per chip, and the names in the Cloud
# TPU API, in GKE and of GKE's machine types; '' if not offered.
_GENERATIONS = (
    ("v2", _FLAT_BY_CORES, 2, 16, "v2", "", ""),
    ("v3", _FLAT_BY_CORES, 2, 32, "v3", "", ""),
    ("v4", _CUBE_BY_CORES, 1, 32, "v4", "tpu-v4-podslice", "ct4p-hightpu"),
    ("v5e", _FLAT_BY_CHIPS, 1, 16, "v5litepod", "tpu-v5-lite-podslice",
     "ct5lp-hightpu"),
    ("v5e", _ON_TWO_HOSTS, 1, 16, "", "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    ("v5p", _CUBE_BY_CORES, 1, 95, "v5p", "tpu-v5p-slice", "ct5p-hightpu"),
    ("v6e", _FLAT_BY_CHIPS, 1, 32, "v6e", "tpu-v6e-slice", "ct6e-standard"),
    ("v6e", _ON_TWO_HOSTS, 1, 32, "", "tpu-v6e-slice", "ct6e-standard"),
    ("tpu7x", _CUBE_BY_CORES, 2, 192, "", "tpu7x", "tpu7x-standard"),
)
SLICES = tuple(
    Slice(
        f"{generation}-{number}", generation, topology, hosts, chips, devices,
        gib, gcloud and f"{gcloud}-{number}", gke,
        machine and f"{machine}-{chips}t",
    )
    for generation, sizes, devices, gib, gcloud, gke, machine in _GENERATIONS
    for number, (topology, hosts, chips) in sizes.items()
)


def find(name: str) -> Slice:
  """Returns the slice of a name of this package or of gcloud.

  Raises:
    KeyError: unknown name; the message lists similar ones.
  """
  names = {s.name: s for s in SLICES}
  names |= {s.gcloud: s for s in SLICES if s.gcloud}
  if name in names:
    return names[name]
  close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)
  raise KeyError(
      f"unknown accelerator {name!r}; expected one of {', '.join(close)}"
  )


def table(slices=SLICES) -> str:
  """Formats the slices as lines of text."""
  rows = [("name", "topology", "hosts", "chips/host", "HBM GiB/chip", "gcloud",
           "GKE accelerator", "GKE machine")]
  rows += [
      (s.name, s.topology, s.hosts, s.chips_per_host, s.hbm_gib,
       s.gcloud or "-", s.gke or "-", s.gke_machine or "-")
      for s in slices
  ]
  columns = zip(*rows, strict=True)
  widths = [max(len(str(v)) for v in column) for column in columns]
  lines = (
      "  ".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True))
      for row in rows
  )
  return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str]) -> None:
  """Runs the command."""
  if argv[1:] in (["--help"], ["-h"]):
    print(__doc__)
    return
  try:
    print(table([find(name) for name in argv[1:]] or SLICES))
  except KeyError as error:
    print(f"error: {error.args[0]}", file=sys.stderr)
    sys.exit(65)


if __name__ == "__main__":
  main(sys.argv)
