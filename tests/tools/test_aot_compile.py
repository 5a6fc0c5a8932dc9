"""Mode compile: the real step for TPUs, by TPU's own compiler."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.tools import aot_compile
from bcm_jax.tools import hlo_cost

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = {
    "model.model_channels": "48", "model.num_groups": "4",
    "model.num_head_channels": "48", "model.channel_mult": "1,",
    "method.s0": "4", "method.s1": "16", "data.name": "none",
    "data.image_shape": "(8,8,1)", "data.num_classes": "10",
}


def tiny(**overrides):
  texts = TINY | {k.replace("__", "."): v for k, v in overrides.items()}
  return resolve.load("configs/digits.py", texts)


def cost(devices, **overrides):
  """Of the step on CPU devices, eight examples on each."""
  config = tiny(training__batch_size=str(8 * devices), **overrides)
  experiment = build.build(config)
  backend = experiment.mesh_backend(jax.devices()[:devices])
  phase = experiment.method.phases()[0]
  return hlo_cost.cost(
      aot_compile.lower(experiment, backend, phase).compile()
  )


@pytest.fixture(scope="module")
def costs():
  return {n: cost(n) for n in (2, 4)}


def test_work_a_device_does_not_grow_with_devices(costs):
  two, four = costs[2], costs[4]
  assert four.flops == pytest.approx(two.flops, rel=0.01)
  assert four.bytes_moved == pytest.approx(two.bytes_moved, rel=0.01)
  assert four.temporaries == pytest.approx(two.temporaries, rel=0.01)
  assert four.collectives == two.collectives
  # Every gradient and a few scalars, once.
  state = jax.eval_shape(
      lambda: build.create_state(build.build(tiny()))
  )
  sizes = jax.tree.leaves(state.networks["student"].params)
  gradients = 4 * sum(x.size for x in sizes)
  (count, size), = four.collectives.values()
  assert gradients <= size <= gradients + 1000
  assert count <= 3


def test_fsdp_holds_less_and_gathers(costs):
  cut = cost(4, parallel__fsdp="0", parallel__sharding="fsdp")
  # Most of the arguments are the state: parameters, two moments, an average.
  assert cut.arguments < 0.6 * costs[4].arguments
  assert "all-gather" in cut.collectives
  assert cut.flops == pytest.approx(costs[4].flops, rel=0.05)


def test_gradients_of_microbatches_are_reduced_once(costs):
  config = tiny(
    training__batch_size="32", parallel__microbatch_size_per_device="4"
  )
  experiment = build.build(config)
  backend = experiment.mesh_backend(jax.devices()[:4])
  assert backend.local
  assert experiment.step_options(backend).microbatches == 2
  compiled = aot_compile.lower(
    experiment, backend, experiment.method.phases()[0]
  ).compile()
  in_entry = compiled.as_text().partition("\nENTRY ")[2]
  once = hlo_cost.collectives(in_entry)
  assert once == hlo_cost.collectives(compiled.as_text())
  assert once["all-reduce"][1] == pytest.approx(
    costs[4].collectives["all-reduce"][1], rel=0.01
  )


def test_the_step_is_donated(costs):
  assert costs[2].aliased >= 0.99 * costs[2].outputs


# Where there are wheels the test extra brings libtpu; then it must be there.
needs_libtpu = pytest.mark.skipif(
  (sys.platform, platform.machine()) != ("linux", "x86_64"),
  reason="libtpu's wheels are for Linux on x86-64 alone",
)


def run(*arguments, rc=0):
  """Runs the command in a process of its own, for libtpu's environment."""
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "bcm_jax.main",
      "--config=configs/digits.py",
      "--mode=compile",
      *(f"--config.{k}={v}" for k, v in TINY.items()),
      *arguments,
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == rc, done.stderr
  return done.stdout + done.stderr


@needs_libtpu
def test_a_report_for_tpus(tmp_path):
  file = tmp_path / "report.json"
  text = run(
    "--topology=v5e:2x2",
    f"--out={file}",
    "--config.training.batch_size=32",
    "--config.model.dtype=bfloat16",
  )
  report = json.loads(file.read_text())
  assert (report["chips"], report["hosts"]) == (4, 1)
  assert report["examples_per_chip"] == 8 and report["microbatches"] == 1
  assert report["device_kind"] == "TPU v5 lite"
  phase = report["phases"]["student"]
  assert set(phase["collectives"]) == {"all-reduce"}
  chip = hlo_cost.CHIPS["v5e"]
  assert phase["of_hbm"] == phase["bytes"]["peak"] / chip.memory
  roof = phase["roofline_ms"]
  assert roof["compute"] == pytest.approx(1e3 * phase["flops"] / chip.flops)
  assert roof["bound"] == max(roof["compute"], roof["memory"])
  assert "f64" not in text and "all-reduce" in text and "fits" in text


@needs_libtpu
def test_too_large_a_batch_is_refused_with_what_to_do():
  line = run(
    "--topology=v5e:2x2",
    "--config.training.batch_size=8388608",
    rc=errors.EXIT_BAD_INPUT,
  ).splitlines()[-1]
  assert line.startswith("error: ") and "15.75G" in line
  assert "parallel.microbatch_size_per_device" in line


@pytest.mark.parametrize(
  "topology,part",
  [
    (None, "--topology"),
    ("v9:2x2", "v9"),
    pytest.param("v5e:3x7", "v5e:3x7", marks=needs_libtpu),
    ("h100:8", "h100.*v4"),
  ],
)
def test_bad_topologies_say_so(topology, part):
  with pytest.raises(errors.UserError, match=part):
    aot_compile.compile_for(tiny(), topology)


def test_peaks_are_those_of_a_device():
  # Both cores of a v4 chip are one device, half of its memory is neither's.
  assert hlo_cost.CHIPS["v4"].megacore
  for chip in hlo_cost.CHIPS.values():
    assert 100 < chip.flops / chip.bandwidth < 1000
    assert chip.memory < 100 * 2**30
