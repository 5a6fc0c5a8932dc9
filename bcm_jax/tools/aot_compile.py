"""Mode compile: ahead-of-time compilation for a TPU topology, without a TPU.
needed.

  python -m bcm_jax.main --config=FILE --mode=compile --topology=v5e:16x16

The compiler of libtpu (`pip install libtpu`) compiles the executable of a pod
on any Linux machine, so that whether a config fits is known before a pod is
rented. Nothing is run: times are roofline bounds from published peaks.
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

# By default libtpu looks for TPUs of this machine and locks them.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_GIB = 2**30
# Share of usable memory; the rest is for batches, metrics and fragmentation.
FITS = 0.9


def run(
    config: ml_collections.ConfigDict, topology: str | None, out: str | None
) -> None:
  """Compiles for a topology and prints, or writes, the report.

  Raises:
    UserError: unknown topology, no libtpu, or the step does not fit.
  """
  report = compile_for(config, topology)
  print(as_text(report))
  if out is not None:
    files.write_json(os.path.abspath(out), report)
    print(f"written: {out}")


def compile_for(
    config: ml_collections.ConfigDict, topology: str | None
) -> dict[str, Any]:
  """Returns the report of a config on a topology, as JSON values."""
  if topology is None:
    raise errors.UserError(
        "mode compile needs --topology, such as v5e:4x4; TPUs are "
        + ", ".join(hlo_cost.CHIPS)
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
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
        "mode compile needs TPU's compiler: pip install libtpu"
    )
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  # Imported here because the import reads the environment.
  from jax.experimental import topologies

  extra = {"chip_config_name": "megacore"} if chip.megacore else {}
  try:
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **extra
    )
  except Exception as e:  # XLA's errors have no class of their own here.
    text = " ".join(str(e).split())[:200]
    raise errors.UserError(
        f"--topology={topology} is unknown to libtpu ({text}); give a shape "
        "that is sold, such as v4:2x2x1, v5e:4x4, v5p:2x2x1 or v6e:8x8"
    ) from e
  return list(found.devices)


def _abstract(tree: Any, placed: jax.sharding.Sharding) -> Any:
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
      k: jax.ShapeDtypeStruct(
          (n, *rest), dtype, sharding=backend.batch_sharding()
      ) for k, (rest, dtype) in fields.items()
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
  """Lowers the training step of a phase, from shapes only."""
  step = train_step.make_step(
      experiment.method, experiment.optimizers(),
      experiment.step_options(backend),
  )
  return backend.compile(step).lower(
      *abstract_inputs(experiment, backend), phase=phase
  )


def _report(experiment, backend, phase, chip: hlo_cost.Chip) -> dict[str, Any]:
  """Compiles the step of a phase; returns its cost per chip."""
  began = time.monotonic()
  lowered = lower(experiment, backend, phase)
  traced = time.monotonic()
  print(f"compiling phase {'+'.join(phase)}; minutes for a large network",
        file=sys.stderr)
  cpu = time.process_time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    raise _does_not_fit(e) or e from e
  done = time.monotonic()
  cost = hlo_cost.cost(compiled)
  times = experiment.step_options(backend).microbatches
  flops, moved = cost.flops * times, cost.bytes_moved * times
  compute, memory = flops / chip.flops, moved / chip.bandwidth
  return {
      # Wall time, and "cpu" of all threads, which other load affects less.
      "seconds": {"trace": traced - began, "compile": done - traced,
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


def _does_not_fit(error: Exception) -> errors.UserError | None:
  """Converts an out-of-memory error of XLA; None for any other error."""
  match = re.search(
      r"Ran out of memory in memory space hbm.*?(?:Used|of) ([\d.]+\w) of "
      r"([\d.]+\w)|memory on HBM.*?\(([\d.]+\w)\) exceeds available HBM "
      r"\(([\d.]+\w)\)", str(error), re.DOTALL,
  )
  if match is None:
    return None
  need, have = (g for g in match.groups() if g is not None)
  return errors.UserError(
      f"the step needs {need} per chip, and a program may use {have}; take "
      f"more "
      "chips, parallel.fsdp=0 with parallel.sharding=fsdp, "
      "parallel.microbatch_size_per_device for gradient accumulation, or "
      "model.remat=True"
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
      f"in "
      f"{report['microbatches']} part(s)",
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
    for kind, each in phase["collectives"].items():
      lines.append(f"  {kind:<18} {each['count']:4d} x, "
                   f"{each['bytes'] / 1e6:.1f} MB in all")
  return "\n".join(lines)
