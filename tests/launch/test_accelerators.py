"""The table of TPU slices, against the compiler library that knows them."""

import json
import math
import os
import platform
import subprocess
import sys

import accelerators
import pytest

# In a process of its own: libtpu, once loaded, stays.
ASK = """
import json, sys
from jax.experimental import topologies
answers = {}
for name, topology, bounds, chip in json.load(sys.stdin):
  more = {"chip_config_name": chip} if chip else {}
  more |= {"chips_per_host_bounds": bounds} if bounds else {}
  devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **more
  ).devices
  answers[name] = [
      len({d.process_index for d in devices}),
      len({tuple(d.coords) for d in devices}),
      len(devices),
  ]
print("ANSWER", json.dumps(answers))
"""
# Of a machine with eight chips; others are what libtpu takes by itself.
EIGHT = [2, 4, 1]


def ask(questions) -> dict[str, list[int]]:
  """Returns {name: hosts, chips, devices} as libtpu has them."""
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  result = subprocess.run(
      [sys.executable, "-c", ASK], input=json.dumps(questions), env=env,
      capture_output=True, text=True, check=False,
  )
  assert result.returncode == 0, result.stderr[-2000:]
  (line,) = (
      line for line in result.stdout.splitlines() if line.startswith("ANSWER ")
  )
  return json.loads(line.removeprefix("ANSWER "))


@pytest.mark.slow
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu's wheels are for Linux on x86-64 alone",
)
def test_hosts_and_chips_are_those_of_libtpu():
  questions = [
      # Two cores of a v4 chip are one device in a run, which libtpu calls
      # megacore.
      (s.name, s.libtpu_topology, EIGHT if s.name.endswith("e-8") else None,
       "megacore" if s.generation == "v4" else "")
      for s in accelerators.SLICES
  ]
  expected = {
      s.name: [s.hosts, s.chips, s.chips * s.devices_per_chip]
      for s in accelerators.SLICES
  }
  assert ask(questions) == expected


def test_topologies_multiply_to_the_chips():
  for s in accelerators.SLICES:
    sizes = [int(n) for n in s.topology.split("x")]
    assert math.prod(sizes) == s.chips, s.name
    flat = s.generation in ("v2", "v3", "v5e", "v6e")
    assert len(sizes) == (2 if flat else 3)


def test_names_are_found_in_both_spellings():
  names = [s.name for s in accelerators.SLICES]
  assert len(set(names)) == len(names)
  assert accelerators.find("v5e-16") is accelerators.find("v5litepod-16")
  assert accelerators.find("v5e-8").hosts == 1
  assert accelerators.find("v5e-8-2hosts").hosts == 2
  assert accelerators.find("v4-32").chips == 16


def test_an_unknown_name_names_its_neighbours():
  with pytest.raises(KeyError, match="v6e-64"):
    accelerators.find("v6e-63")


def test_table_has_a_line_each(checkout):
  result = checkout.run("accelerators.py")
  assert result.returncode == 0, result.stderr
  assert len(result.stdout.splitlines()) == len(accelerators.SLICES) + 1
  one = checkout.run("accelerators.py", "v6e-64")
  assert "8x8" in one.stdout.splitlines()[1]
  wrong = checkout.run("accelerators.py", "v9-1")
  assert wrong.returncode == 65
  assert wrong.stderr.startswith("error: unknown accelerator 'v9-1'")
