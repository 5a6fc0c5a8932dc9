"""Time and cost of a training step, for any config and backend.

  python benchmarks/step_time.py --config=configs/cifar10.py --out=FILE
  python benchmarks/step_time.py --config=configs/digits.py --scaling=1,2,4,8

Runs the training step on the real input pipeline (or on --synthetic images, if
the dataset is not available) and writes JSON: milliseconds per step (median and
range), images per second, model FLOPs utilization relative to a matrix product
measured in the same run, memory, the fraction of a step that waits for data,
and compile time. --backends=jit,pmap measures both in alternating blocks, so
that their ratio does not depend on the load of the machine.

--scaling compiles the step for 1, 2, ... devices at a fixed batch size per
device, and reports FLOPs, bytes and collectives per device. It reports no
times, which are meaningless on virtual CPU devices (the default on a CPU).
"""

from collections.abc import Callable
import contextlib
import functools
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import train
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.tools import aot_compile
from bcm_jax.tools import hlo_cost
from bcm_jax.training import multihost
from bcm_jax.training import sharding
from bcm_jax.training import train_step
from bcm_jax.utils import cli
from bcm_jax.utils import files
from bcm_jax.utils import provenance

Phase = tuple[str, ...]

_BLOCKS = 3
_SYNTHETIC = 4096


def matmul_peak(dtype: str) -> float:
  """Operations per second of one device in a large matrix product."""
  n = 1024 if jax.default_backend() == "cpu" else 8192
  a = jnp.ones((n, n), dtype)
  repeats = 8

  @jax.jit
  def chain(x):
    return jax.lax.fori_loop(0, repeats, lambda _, y: y @ a / n, x)

  jax.block_until_ready(chain(a))
  best = float("inf")
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(chain(a))
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 * repeats / best


def synthetic(experiment: build.Experiment) -> image_source.ArraySource:
  """Random images in memory: an input pipeline without disk and decoding."""
  rng = np.random.default_rng(0)
  shape = (_SYNTHETIC, *experiment.image_shape)
  labels = None
  if experiment.num_classes is not None:
    labels = rng.integers(0, experiment.num_classes, _SYNTHETIC)
  return image_source.ArraySource(
      rng.integers(0, 256, shape, np.uint8), labels, experiment.num_classes,
      "synthetic",
  )


class Bench:
  """Compiled training step of one backend."""

  def __init__(self, config: Any, backend: str, source: Any):
    overrides = {"parallel.backend": backend}
    config = resolve.resolve(config.to_dict(), overrides)
    self.experiment = build.build(config)
    self.backend = self.experiment.backend()
    self.source = source
    self.per_call = config.parallel.substeps
    step = train_step.make_step(
        self.experiment.method, self.experiment.optimizers(),
        self.experiment.step_options(self.backend),
    )
    self.step_fn = self.backend.compile(step, self.per_call > 1)
    self.state = self.backend.create(
        lambda: build.create_state(self.experiment)
    )
    self.state = self.state.replace(
        frozen=self.backend.place(build.load_frozen(self.experiment))
    )
    self.steps = 0
    self.waited = 0.0
    self.seconds: dict[Phase, list[float]] = {}
    start = time.perf_counter()
    self.run(self._round())
    self.compile_seconds = time.perf_counter() - start
    self.seconds, self.waited = {}, 0.0

  def _round(self) -> int:
    """Number of calls until every phase has run."""
    method, phases, calls = self.experiment.method, set(), 0
    while phases != set(method.phases()):
      phases.add(method.phase(calls * self.per_call))
      calls += 1
    return calls

  def run(self, calls: int) -> None:
    """Times calls one by one, blocking after each."""
    k = self.per_call
    todo = [(self.steps + k * i, k) for i in range(calls)]
    self.steps += k * calls
    method = self.experiment.method
    with train.stream(
        self.experiment, self.source, self.backend, todo, 0
    ) as stream:
      for i in range(calls):
        start = time.perf_counter()
        inputs = next(stream)
        if i:  # The first call of a block fills the pipeline.
          self.waited += time.perf_counter() - start
        phase = method.phase(todo[i][0])
        self.state, metrics = self.step_fn(self.state, *inputs, phase)
        jax.block_until_ready(metrics)
        if i or calls == 1:
          seconds = (time.perf_counter() - start) / self.per_call
          self.seconds.setdefault(phase, []).append(seconds)

  def mean(self, of_phase: Callable[[Phase], float]) -> float:
    """Averages a quantity per step, weighting phases by their frequency."""
    timed = sum(map(len, self.seconds.values()))
    return sum(
        len(s) / timed * of_phase(phase) for phase, s in self.seconds.items()
    )

  def median(self) -> float:
    """Seconds per step: the median of each phase, averaged over phases."""
    return self.mean(lambda phase: statistics.median(self.seconds[phase]))

  def result(self, peak: float) -> dict[str, Any]:
    """Returns the metrics of all blocks so far.

    Args:
      peak: operations per second of one device.
    """
    batch = self.experiment.config.training.batch_size
    seconds = [s for phase_secs in self.seconds.values() for s in phase_secs]
    median = self.median()
    flops = self.mean(functools.partial(model_flops, self.experiment))
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "ms_per_step": 1e3 * median,
        "ms_spread": [1e3 * min(seconds), 1e3 * max(seconds)],
        "steps_timed": len(seconds) * self.per_call,
        "images_per_second": batch / median,
        "compile_seconds": self.compile_seconds,
        "data_wait_share": self.waited / (sum(seconds) * self.per_call),
        "model_tflop_per_step": flops / 1e12,
        "mfu": flops / median / (peak * self.backend.devices),
        "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
    }


def model_flops(experiment: build.Experiment, phase: Phase) -> int:
  """FLOPs of a step of the global batch, without rematerialization.

  Loops of random length, such as CTM's solver, count once.
  """
  overrides = {"parallel.microbatch_size_per_device": "0"}
  if "remat" in experiment.config.model:
    overrides["model.remat"] = "False"
  config = resolve.resolve(experiment.config.to_dict(), overrides)
  plain = build.build(config)
  backend = sharding.Jit(sharding.make_mesh(jax.devices()[:1]))
  step = train_step.make_step(
      plain.method, plain.optimizers(), plain.step_options(backend)
  )
  state, batch, curriculum = aot_compile.abstract_inputs(plain, backend)
  return hlo_cost.count_flops(
      functools.partial(step, phase=phase),
      state, batch, curriculum,
  )


def scaling(config: Any, counts: list[int]) -> list[dict[str, Any]]:
  """Cost per device of the compiled step, at a fixed batch size per device."""
  rows = []
  for count in counts:
    batch = config.training.batch_size * count
    sized = resolve.resolve(
        config.to_dict(), {"training.batch_size": str(batch)}
    )
    experiment = build.build(sized)
    backend = experiment.mesh_backend(jax.devices()[:count])
    phase = experiment.method.phases()[0]
    cost = hlo_cost.cost(
        aot_compile.lower(experiment, backend, phase).compile()
    )
    rows.append({
        "devices": count, "batch_size": batch, "flops": cost.flops,
        "bytes_moved": cost.bytes_moved, "temporaries": cost.temporaries,
        "collectives": {
            k: {"count": n, "bytes": b}
            for k, (n, b) in sorted(cost.collectives.items())
        },
    })
    print(rows[-1], flush=True)
  return rows


def measure(
    config: Any, backends: list[str], calls: int, source: Any
) -> dict[str, Any]:
  """Times the backends in alternating blocks of calls."""
  benches = {name: Bench(config, name, source) for name in backends}
  for _ in range(_BLOCKS):
    for bench in benches.values():
      bench.run(1 + calls // _BLOCKS)
  dtype = config.model.dtype or "float32"
  peak = matmul_peak(dtype)
  return {
      "matmul": {"dtype": dtype, "tflops_per_device": peak / 1e12},
      "backends": {k: bench.result(peak) for k, bench in benches.items()},
  }


def write(result: dict[str, Any], rows: dict[str, Any], out: str | None):
  """Prints the rows of a result, and writes the result to `out` if given."""
  for name, row in rows.items():
    print(name, row)
  if out:
    files.write_json(os.path.abspath(out), result)
    print(f"written: {out}")


def main(argv: list[str] | None = None) -> None:
  """Measures, prints and writes."""
  parser = cli.Parser("benchmarks/step_time.py", __doc__, config="file")
  add = parser.add_argument
  add("--out", metavar="FILE", help="JSON to write")
  add("--calls", type=int, default=15, metavar="N",
      help="timed calls (%(default)s)")
  add("--backends", default="jit", metavar="jit,pmap", help="(%(default)s)")
  add("--synthetic", action="store_true", help="random images")
  add("--scaling", default="", metavar="1,2,4,8",
      help="compile for these numbers of devices")
  args = parser.parse_args(argv)
  config = resolve.load(args.config, args.overrides)
  counts = [int(n) for n in args.scaling.split(",") if n]
  multihost.use_cores(
      max(counts, default=config.parallel.cpu_devices),
      config.training.batch_size,
  )
  experiment = build.build(config)
  result: dict[str, Any] = {
      "batch_size": config.training.batch_size,
      "substeps": config.parallel.substeps,
  }
  if counts:
    result["scaling"] = scaling(config, counts)
  else:
    source = synthetic(experiment) if args.synthetic else (
        experiment.training_source()
    )
    result["source"] = source.name
    result |= measure(config, args.backends.split(","), args.calls, source)
  result["facts"] = provenance.facts(experiment.config)
  write(result, result.get("backends", {}), args.out)


if __name__ == "__main__":
  with contextlib.suppress(KeyboardInterrupt), cli.reporting():
    main()
