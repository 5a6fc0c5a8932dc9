"""Mode compile: ahead-of-time compilation for a TPU topology, without a TPU.

  python -m bcm_jax.main --config=FILE --mode=compile --topology=v5e:16x16

The compiler of libtpu (`pip install libtpu`) compiles the executable of a pod
on any Linux machine. It reports whether a config fits into memory. Nothing is
run: times are roofline bounds from published peaks.
"""

import importlib.util
import os
import re
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.tools import hlo_cost
from bcm_jax.training import sharding
from bcm_jax.training import train_step
from bcm_jax.utils import files
from bcm_jax.utils import provenance

# By default libtpu searches for local TPUs and locks them.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_GIB = 2**30
# Largest fraction of usable memory that fits; the rest is for batches, metrics
# and fragmentation.
FITS = 0.9


def run(
    config: ml_collections.ConfigDict, topology: str | None, out: str | None
) -> None:
  """Compiles for a topology; prints the report and writes it as JSON.

  Args:
    config: resolved config.
    topology: for example 'v5e:4x4'.
    out: path of the JSON file, or None.

  Raises:
    UserError: an unknown topology, libtpu is not installed, or the step does
      not fit into memory.
  """
  report = compile_for(config, topology)
  print(as_text(report))
  if out is not None:
    files.write_json(os.path.abspath(out), report)
    print(f"written: {out}")


def compile_for(
    config: ml_collections.ConfigDict, topology: str | None
) -> dict[str, Any]:
  """Compiles a config for a topology; returns the report as JSON values.

  Raises:
    UserError: as `run`.
  """
  if topology is None:
    raise errors.UserError(
        "--topology: got None, expected for example v5e:4x4 in mode compile; "
        "TPUs are " + ", ".join(hlo_cost.CHIPS)
    )
  chip = hlo_cost.find_chip(topology)
  devices = _devices(topology, chip)
  experiment = build.build(config)
  backend = experiment.mesh_backend(devices)
  phases = {}
  for phase in experiment.method.phases():
    phases["+".join(phase)] = _report(experiment, backend, phase, chip)
  options = experiment.step_options(backend)
  return {
      "topology": topology,
      "chips": len(devices),
      "hosts": len({d.process_index for d in devices}),
      "device_kind": devices[0].device_kind,
      "mesh": dict(backend.mesh.shape),
      "sharding": list(config.parallel.sharding),
      "batch_size": config.training.batch_size,
      "examples_per_chip": config.training.batch_size // len(devices),
      "microbatches": options.microbatches,
      "hbm_gib": chip.memory / _GIB,
      "phases": phases,
      "versions": {"libtpu": _libtpu_version()},
      "facts": provenance.facts(experiment.config),
  }


def _devices(topology: str, chip: hlo_cost.Chip) -> list[Any]:
  """Returns the abstract devices of a topology."""
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
        "libtpu: got no such package, expected it for mode compile; pip "
        "install libtpu"
    )
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  # Imported here because the import reads the environment.
  from jax.experimental import topologies

  options = {"chip_config_name": "megacore"} if chip.megacore else {}
  try:
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    )
  except Exception as e:  # XLA raises plain exceptions here.
    text = " ".join(str(e).split())[:200]
    raise errors.UserError(
        f"--topology: got {topology}, expected a topology of libtpu such as "
        f"v4:2x2x1, v5e:4x4, v5p:2x2x1 or v6e:8x8 ({text})"
    ) from e
  return list(description.devices)


def _abstract(tree: Any, placed: jax.sharding.Sharding) -> Any:
  """Returns the shapes of a tree with one sharding."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          np.shape(x), np.asarray(x).dtype, sharding=placed
      ), tree,
  )


def abstract_inputs(
    experiment: build.Experiment, backend: sharding.Jit
) -> tuple[Any, Any, Any]:
  """Returns shapes and shardings of (state, batch, curriculum)."""
  state = jax.eval_shape(lambda: build.create_state(experiment))
  state = backend.abstract(
      state.replace(frozen=build.frozen_shapes(experiment))
  )
  n, shape = experiment.config.training.batch_size, experiment.image_shape
  fields = {"image": (shape, np.uint8), "index": ((), np.int32),
            "label": ((), np.int32)}
  if experiment.config.data.pairs is not None:
    fields["noise"] = (shape, np.float16)
  batch = build.network_inputs(experiment, {
      name: jax.ShapeDtypeStruct(
          (n, *field_shape), dtype, sharding=backend.batch_sharding()
      ) for name, (field_shape, dtype) in fields.items()
  })
  curriculum = _abstract(
      sharding.curricula(experiment.method, 0, 1),
      jax.NamedSharding(backend.mesh, jax.P()),
  )
  return state, batch, curriculum


def lower(
    experiment: build.Experiment,
    backend: sharding.Jit,
    phase: tuple[str, ...],
) -> jax.stages.Lowered:
  """Lowers the training step of a phase from abstract inputs."""
  step = train_step.make_step(
      experiment.method, experiment.optimizers(),
      experiment.step_options(backend),
  )
  return backend.compile(step).lower(
      *abstract_inputs(experiment, backend), phase=phase
  )


def _report(experiment, backend, phase, chip: hlo_cost.Chip) -> dict[str, Any]:
  """Compiles the step of a phase; returns its cost per chip."""
  start = time.monotonic()
  lowered = lower(experiment, backend, phase)
  traced = time.monotonic()
  print(f"compiling phase {'+'.join(phase)}; minutes for a large network",
        file=sys.stderr)
  cpu = time.process_time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    raise _out_of_memory_error(e) or e from e
  end = time.monotonic()
  cost = hlo_cost.cost(compiled)
  times = experiment.step_options(backend).microbatches
  flops, moved = cost.flops * times, cost.bytes_moved * times
  compute, memory = flops / chip.flops, moved / chip.bandwidth
  return {
      # Wall time, and CPU time of all threads, which varies less with load.
      "seconds": {"trace": traced - start, "compile": end - traced,
                  "cpu": time.process_time() - cpu},
      "bytes": {
          "arguments": cost.arguments, "temporaries": cost.temporaries,
          "outputs_not_aliased": cost.outputs - cost.aliased,
          "code": cost.code, "peak": cost.peak,
      },
      "of_hbm": cost.peak / chip.memory,
      "flops": flops,
      "bytes_moved": moved,
      "intensity": flops / moved,
      "roofline_ms": {
          "compute": 1e3 * compute, "memory": 1e3 * memory,
          "bound": 1e3 * max(compute, memory),
      },
      "collectives": {
          kind: {"count": count, "bytes": size}
          for kind, (count, size) in sorted(cost.collectives.items())
      },
  }


def _out_of_memory_error(error: Exception) -> errors.UserError | None:
  """Converts an out-of-memory error of XLA; returns None for other errors."""
  match = re.search(
      r"Ran out of memory in memory space hbm.*?(?:Used|of) ([\d.]+\w) of "
      r"([\d.]+\w)|memory on HBM.*?\(([\d.]+\w)\) exceeds available HBM "
      r"\(([\d.]+\w)\)", str(error), re.DOTALL,
  )
  if match is None:
    return None
  required, available = (g for g in match.groups() if g is not None)
  return errors.UserError(
      f"memory per chip: got {required} for the step, expected at most "
      f"{available}; use more chips, parallel.fsdp=0 with "
      "parallel.sharding=fsdp, parallel.microbatch_size_per_device for "
      "gradient accumulation, or model.remat=True"
  )


def _libtpu_version() -> str:
  from importlib import metadata

  return metadata.version("libtpu")


def as_text(report: dict[str, Any]) -> str:
  """Formats the report for a terminal."""
  lines = [
      f"{report['topology']}: {report['chips']} chips on {report['hosts']} "
      f"host(s), mesh {report['mesh']}, sharding {report['sharding']}",
      f"batch {report['batch_size']}: {report['examples_per_chip']} per chip "
      f"in {report['microbatches']} microbatch(es)",
  ]
  for name, phase in report["phases"].items():
    size, roof = phase["bytes"], phase["roofline_ms"]
    fits = "fits" if phase["of_hbm"] <= FITS else "TOO TIGHT"
    lines += [
        f"phase {name}: compiled in {phase['seconds']['compile']:.0f} s",
        f"  memory     {size['peak'] / _GIB:.2f} of {report['hbm_gib']:.2f} "
        f"GiB per chip, {100 * phase['of_hbm']:.0f}% ({fits}): arguments "
        f"{size['arguments'] / _GIB:.2f}, temporaries "
        f"{size['temporaries'] / _GIB:.2f}, code {size['code'] / _GIB:.2f}",
        f"  work       {phase['flops'] / 1e12:.2f} TFLOP and "
        f"{phase['bytes_moved'] / 1e9:.1f} GB moved per chip and step, "
        f"{phase['intensity']:.0f} FLOP per byte",
        f"  roofline   {roof['bound']:.0f} ms per step at least (compute "
        f"{roof['compute']:.0f}, memory {roof['memory']:.0f}; published peaks)",
    ]
    for kind, total in phase["collectives"].items():
      lines.append(f"  {kind:<18} {total['count']:4d} x, "
                   f"{total['bytes'] / 1e6:.1f} MB in total")
  return "\n".join(lines)
