"""Time of a training step of each method, relative to iCT.

  python benchmarks/step_cost.py --teacher=runs/edm --pairs=runs/edm/pairs.npz
      \\ --out=docs/results/step_cost_digits.json

Times the training steps of the digits configs in alternating blocks, so that
ratios do not depend on the load of the machine. Methods whose networks train in
turns are averaged over a round. All have the same network and batch size.
"""

import contextlib
import statistics
from typing import Any

import step_time

from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.training import multihost
from bcm_jax.utils import cli
from bcm_jax.utils import provenance

# The first one is the baseline.
CONFIGS = {
    "ict": "digits_ict.py", "bcm": "digits.py", "edm": "digits_edm.py",
    "cd": "digits_cd.py", "ctm": "digits_ctm.py",
    "ctm_gan": "digits_ctm.py:gan", "dmd": "digits_dmd.py:dmd",
    "dmd2_no_gan": "digits_dmd.py:no_gan", "dmd2": "digits_dmd.py",
}
_BATCH, _BLOCKS = 64, 5
_ROUND = 10  # Steps per block: a multiple of every method's round.


def _config(file: str, teacher: str, pairs: str) -> Any:
  overrides = {
      "training.batch_size": str(_BATCH), "training.init_from": "none",
      "optimizer.schedule": "constant",
  }
  plain = resolve.load(f"configs/{file}", overrides)
  if "teacher" in plain.method:
    overrides["method.teacher"] = teacher
  if plain.data.pairs is not None:
    overrides["data.pairs"] = pairs
  return resolve.load(f"configs/{file}", overrides)


def _mean(bench: step_time.Bench) -> float:
  """Mean seconds per step; not the median, as CTM's solver steps are random."""
  return bench.mean(lambda phase: statistics.fmean(bench.seconds[phase]))


def main(argv: list[str] | None = None) -> None:
  """Runs the command."""
  parser = cli.Parser("benchmarks/step_cost.py", __doc__)
  add = parser.add_argument
  add("--teacher", default="runs/edm", metavar="DIR",
      help="run of the teacher (%(default)s)")
  add("--pairs", default="runs/edm/pairs.npz", metavar="FILE",
      help="pairs of the teacher (%(default)s)")
  add("--only", default="", metavar="ict,bcm", help="methods to time (all)")
  add("--out", metavar="FILE", help="JSON to write")
  args = parser.parse_args(argv)
  multihost.use_cores(0, _BATCH)
  names = args.only.split(",") if args.only else list(CONFIGS)
  benches = {}
  for name in names:
    config = _config(CONFIGS[name], args.teacher, args.pairs)
    source = build.build(config).training_source()
    benches[name] = step_time.Bench(config, "jit", source)
    print(f"{name}: compiled", flush=True)
  for _ in range(_BLOCKS):
    for bench in benches.values():
      bench.run(1 + _ROUND)
  seconds = {name: _mean(bench) for name, bench in benches.items()}
  rows = {
      name: {
          "ms_per_step": 1e3 * seconds[name],
          "ratio": seconds[name] / seconds[names[0]],
          "compile_seconds": bench.compile_seconds,
      } for name, bench in benches.items()
  }
  step_time.write({
      "batch_size": _BATCH, "steps": _BLOCKS * _ROUND, "baseline": names[0],
      "methods": rows, "facts": provenance.machine(),
  }, rows, args.out)


if __name__ == "__main__":
  with contextlib.suppress(KeyboardInterrupt), cli.reporting():
    main()
