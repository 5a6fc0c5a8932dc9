"""The command: python -m bcm_jax.main --config=FILE --workdir=DIR --mode=MODE.

Any value of a config can be set as --config.section.key=value. In every mode
but train, --config may be left out where the work directory holds a run.
Exit status: 0 done, 65 bad input (one line says what).
"""

import sys

from absl import app
from absl import flags
from absl import logging

from bcm_jax import config as configs
from bcm_jax import errors

_MODES = ("train", "sample", "invert", "edit", "eval", "inspect")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(_MODES)}.")
_COMPARE = flags.DEFINE_string(
    "compare", None, "Mode inspect: work directory of a second run."
)
# Read before absl parses; declared so that --help shows it.
flags.DEFINE_string(
    "config", None, "Config file; --config.section.key=value sets a value."
)


def _load(file, overrides, mode: str, workdir: str | None):
  if file is not None:
    return configs.resolve(configs.read_file(file), overrides)
  run = None
  if workdir is not None and mode != "train":
    run = configs.of_run(workdir, overrides)
  if run is None:
    names = ", ".join(p.name for p in configs.shipped_configs())
    raise errors.UserError(
        f"--config is missing, and --workdir={workdir} holds no run to take "
        f"it from; pass --config=configs/NAME, shipped are {names}"
    )
  return run


def run(file, overrides) -> None:
  """Dispatches to a command."""
  mode, workdir = _MODE.value, _WORKDIR.value
  if mode not in _MODES:
    raise errors.unknown_name("--mode", mode, _MODES)
  if workdir is None and mode != "inspect":
    raise errors.UserError(f"--workdir is missing; mode {mode} needs one")
  config = _load(file, overrides, mode, workdir)
  # Imported late: a wrong flag should not wait for TensorFlow.
  from bcm_jax import evaluate
  from bcm_jax import experiment
  from bcm_jax import generate
  from bcm_jax import inspection
  from bcm_jax import train
  from bcm_jax.training import parallel

  training = config.training
  parallel.use_cores(
      training.cpu_devices, training.batch_size // training.microbatches
  )
  if mode == "train":
    train.train_and_evaluate(config, workdir)
  elif mode == "inspect":
    print(inspection.report(config, workdir, _COMPARE.value))
  elif mode == "eval":
    evaluate.run(experiment.build(config), workdir)
  else:
    for folder in generate.run(experiment.build(config), workdir, mode):
      print(f"written: {folder}")


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  argv = sys.argv if argv is None else argv
  logging.set_verbosity(logging.WARNING)
  try:
    file, overrides, rest = configs.split_overrides(argv[1:])

    def start(unused):
      if len(unused) > 1:
        raise errors.UserError(
            f"unexpected argument {unused[1]!r}; flags start with --"
        )
      run(file, overrides)

    app.run(start, argv=[argv[0], *rest])
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(errors.EXIT_BAD_INPUT)


if __name__ == "__main__":
  main()
