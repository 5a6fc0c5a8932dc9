"""The command: python -m bcm_jax.main --config=FILE --workdir=DIR --mode=MODE.

Any value of a config can be set as --config.section.key=value. In every mode
but train, --config may be left out where the work directory holds a run. The
same command starts a run, continues it, and joins it on every host of a pod.
Exit status: 0 done, 65 bad input, 74 the machine fails, 75 preempted and
saved, start again (docs/reliability.md).
"""

import sys

from absl import app
from absl import logging

from bcm_jax import arguments
from bcm_jax.config import resolve
from bcm_jax.evaluation import tables
from bcm_jax.utils import cli


def run(file, overrides) -> None:
  """Dispatches to a command."""
  args = arguments.values()
  args.check()
  mode, workdir = args.mode, args.workdir
  if mode == "table":
    tables.run(workdir)
    return
  config = resolve.load(file, overrides, workdir, mode != "train")
  # Imported late: a wrong flag should not wait for TensorFlow.
  from bcm_jax import sample
  from bcm_jax import train
  from bcm_jax.config import build
  from bcm_jax.evaluation import evaluate
  from bcm_jax.evaluation import references
  from bcm_jax.evaluation import time_search
  from bcm_jax.generate import teacher_pairs
  from bcm_jax.tools import aot_compile
  from bcm_jax.tools import inspect_config
  from bcm_jax.training import multihost

  if mode == "compile":
    aot_compile.run(config, args.topology, args.out)
    return
  multihost.connect(
      args.coordinator, args.num_processes, args.process_id,
      config.parallel.heartbeat_secs, workdir,
  )
  multihost.use_cores(
      config.parallel.cpu_devices, config.training.batch_size,
      args.num_processes or 1,
  )
  if mode == "train":
    train.train_and_evaluate(config, workdir)
    return
  if mode == "inspect":
    print(inspect_config.report(config, workdir, args.compare))
    return
  built = build.build(config, to_train=False)
  if mode in ("eval", "search", "reference", "pairs"):
    room = dict(
      eval=evaluate,
      search=time_search,
      reference=references,
      pairs=teacher_pairs,
    )[mode]
    room.run(built, workdir)
  else:
    for folder in sample.run(built, workdir, mode):
      print(f"written: {folder}")


def main(argv: list[str] | None = None) -> None:
  """Entry point; foreseen ends are one line and an exit status."""
  argv = sys.argv if argv is None else argv
  logging.set_verbosity(logging.WARNING)
  with cli.reporting():
    file, overrides, rest = resolve.split_overrides(argv[1:])
    app.run(
      lambda _: run(file, overrides),
      [argv[0], *rest],
      flags_parser=arguments.parse,
    )


if __name__ == "__main__":
  cli.quiet_tensorflow()
  main()
