"""The command: python -m bcm_jax.main --config=FILE --workdir=DIR --mode=MODE.

Any value of a config can be set as --config.section.key=value. In every mode
but train, --config may be left out where the work directory holds a run.
Exit status: 0 done, 65 bad input (one line says what).
"""

import sys

from absl import app
from absl import flags
from absl import logging

from bcm_jax import command
from bcm_jax import config as configs
from bcm_jax import errors
from bcm_jax import tables

_MODES = ("train", "sample", "invert", "edit", "eval", "search", "reference",
          "table", "inspect")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(_MODES)}.")
_COMPARE = flags.DEFINE_string("compare", None, "Mode inspect: a second run.")
# Read before absl parses; declared so that --help shows it.
flags.DEFINE_string(
    "config", None, "Config file; --config.section.key=value sets a value."
)


def run(file, overrides) -> None:
  """Dispatches to a command."""
  mode, workdir = _MODE.value, _WORKDIR.value
  if mode not in _MODES:
    raise errors.unknown_name("--mode", mode, _MODES)
  if workdir is None and mode != "inspect":
    raise errors.UserError(f"--workdir is missing; mode {mode} needs one")
  if mode == "table":
    tables.run(workdir)
    return
  config = configs.load(file, overrides, workdir, mode != "train")
  # Imported late: a wrong flag should not wait for TensorFlow.
  from bcm_jax import evaluate
  from bcm_jax import experiment
  from bcm_jax import generate
  from bcm_jax import inspection
  from bcm_jax import references
  from bcm_jax import search
  from bcm_jax import train
  from bcm_jax.training import parallel

  t = config.training
  parallel.use_cores(t.cpu_devices, t.batch_size // t.microbatches)
  if mode == "train":
    train.train_and_evaluate(config, workdir)
  elif mode == "inspect":
    print(inspection.report(config, workdir, _COMPARE.value))
  elif mode in ("eval", "search", "reference"):
    room = dict(eval=evaluate, search=search, reference=references)[mode]
    room.run(experiment.build(config), workdir)
  else:
    for folder in generate.run(experiment.build(config), workdir, mode):
      print(f"written: {folder}")


def _parse(argv: list[str]) -> list[str]:
  # A second call, as from a notebook, starts from the defaults again.
  for flag in (_WORKDIR, _MODE, _COMPARE):
    flags.FLAGS[flag.name].unparse()
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as e:
    raise errors.UserError(f"{e}; --help lists the flags") from e
  if len(rest) > 1:
    raise errors.UserError(
        f"unexpected argument {rest[1]!r}; flags start with --"
    )
  return rest


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  argv = sys.argv if argv is None else argv
  logging.set_verbosity(logging.WARNING)
  with command.reporting():
    file, overrides, rest = configs.split_overrides(argv[1:])
    app.run(
        lambda _: run(file, overrides), [argv[0], *rest], flags_parser=_parse
    )


if __name__ == "__main__":
  command.quiet_tensorflow()
  main()
