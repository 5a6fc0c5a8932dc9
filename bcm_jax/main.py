"""Trains a model, samples from it, edits images with it and evaluates it.

  bcm_jax train --config=FILE --workdir=DIR      trains
  bcm_jax MODE --workdir=DIR                     uses the run

The same command starts a run, resumes it, and joins it on every host of a pod.
Exit status: 0 done, 65 bad input, 74 machine failure, 75 preempted after saving
a checkpoint: restart (docs/reliability.md).
"""

from collections.abc import Callable, Sequence
import os
import signal
import sys
import threading
from typing import NamedTuple

from absl import app
from absl import flags
from absl import logging

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.utils import addresses
from bcm_jax.utils import cli

FLAGS = flags.FLAGS
_FLAGS = (
    # cli.split_overrides reads it before absl; defined here for --help.
    flags.DEFINE_string(
        "config", None, "config file; optional if --workdir contains a run"
    ),
    flags.DEFINE_string("workdir", None, "directory of the run"),
    flags.DEFINE_string("mode", "train", "one of the modes above (train)"),
    flags.DEFINE_string("compare", None, "inspect: a second run, DIR or @STEP"),
    flags.DEFINE_string("topology", None, "compile: TPUs, such as v5e:16x16"),
    flags.DEFINE_string("out", None, "compile: file of the report"),
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, if JAX finds no cluster"
    ),
    flags.DEFINE_integer(
        "num_processes", None, "processes of the run; with --coordinator"
    ),
    flags.DEFINE_integer(
        "process_id", None, "number of this process; with --coordinator"
    ),
)

# The functions below import modules when called, so that --help and flag errors
# do not wait for the import of JAX.


def _train(config, workdir):
  from bcm_jax import train
  train.train_and_evaluate(config, workdir)


def _sample(config, workdir):
  from bcm_jax import sample
  for folder in sample.run(_experiment(config), workdir, FLAGS.mode):
    print(f"written: {folder}")


def _eval(config, workdir):
  from bcm_jax.evaluation import evaluate
  evaluate.run(_experiment(config), workdir)


def _search(config, workdir):
  from bcm_jax.evaluation import time_search
  time_search.run(_experiment(config), workdir)


def _reference(config, workdir):
  from bcm_jax.evaluation import references
  references.run(_experiment(config), workdir)


def _table(places, workdir):
  from bcm_jax.evaluation import tables
  tables.run(workdir, places)


def _inspect(config, workdir):
  from bcm_jax.tools import inspect_config
  print(inspect_config.report(config, workdir, FLAGS.compare))


def _compile(config, _):
  from bcm_jax.tools import aot_compile
  aot_compile.run(config, FLAGS.topology, FLAGS.out)


def _pairs(config, workdir):
  from bcm_jax.generate import teacher_pairs
  teacher_pairs.run(_experiment(config), workdir)


class Mode(NamedTuple):
  """A value of --mode.

  Attributes:
    help: one line of --help.
    function: (resolved config, work directory) -> None; of table, (folders and
      files, work directory).
  """

  help: str
  function: Callable[..., None]


MODES = {
    "train": Mode("train, or resume the run in --workdir", _train),
    "sample": Mode("generate images", _sample),
    "invert": Mode("encode real images to latents and decode them", _sample),
    "edit": Mode("edit real images: inpaint, restore, interpolate", _sample),
    "eval": Mode("compute FID, precision, recall and other metrics", _eval),
    "search": Mode("search for the times of a sampler with the best FID",
                   _search),
    "reference": Mode("write the statistics that FID compares with",
                      _reference),
    "table": Mode("render tables of runs and result files: table RUN [RUN ...]",
                  _table),
    "inspect": Mode("print all config keys, schedules, parameters, the run",
                    _inspect),
    "compile": Mode("compile the training step for TPUs, without a TPU",
                    _compile),
    "pairs": Mode("write (noise, image) pairs of a teacher, for DMD", _pairs),
}
_WITHOUT_WORKDIR = ("inspect", "compile")
# Flag -> the only mode that reads it.
_OF_MODE = {"compare": "inspect", "topology": "compile", "out": "compile"}


def _experiment(config):
  from bcm_jax.config import build
  return build.build(config, to_train=False)


def _connect(config, workdir):
  """Joins the other processes and sets the CPU devices, before JAX starts."""
  from bcm_jax.training import multihost
  multihost.connect(
      FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id,
      config.parallel.heartbeat_secs, workdir,
  )
  multihost.use_cores(
      config.parallel.cpu_devices, config.training.batch_size,
      FLAGS.num_processes or 1,
  )


def run(
    file: str | None, overrides: dict[str, str], places: Sequence[str] = ()
) -> None:
  """Checks the flags, resolves the config and runs the mode.

  Args:
    file: config file, or None.
    overrides: 'section.key' -> text.
    places: the arguments that are no flags, of mode table.

  Raises:
    UserError: flags or config are invalid, or the mode fails on its input.
  """
  mode, workdir = FLAGS.mode, FLAGS.workdir
  if mode not in MODES:
    raise errors.unknown_name("--mode", mode, MODES)
  in_main = threading.current_thread() is threading.main_thread()
  if mode == "train" and in_main:
    # Until training handles it, there is nothing to save.
    signal.signal(signal.SIGTERM, _end_at_once)
  for flag in _FLAGS:
    value = FLAGS[flag.name].value
    if isinstance(value, str):
      addresses.check_local(f"--{flag.name}", value)
  if file is not None:
    addresses.check_local("--config", file)
  if places and mode != "table":
    raise errors.UserError(
        f"arguments: got {places[0]!r}, expected only flags; write "
        "--FLAG=VALUE"
    )
  for place in places:
    addresses.check_local("table", place)
  if workdir is None and not places and mode not in _WITHOUT_WORKDIR:
    raise errors.UserError(
        f"--workdir: got None, expected a folder for mode {mode}; set it"
    )
  for flag, flag_mode in _OF_MODE.items():
    if FLAGS[flag].present and mode != flag_mode:
      raise errors.UserError(
          f"--{flag}: got mode {mode}, expected mode {flag_mode}; remove it"
      )
  config = list(places)
  if mode == "table":
    if file is not None or overrides:
      raise errors.UserError(
          "--config: got a config, expected None for mode table; remove it"
      )
  else:
    from bcm_jax.config import resolve

    config = resolve.load(file, overrides, workdir)
    if mode != "compile":
      _connect(config, workdir)
  MODES[mode].function(config, workdir)


def _end_at_once(number, frame) -> None:
  del number, frame
  os.write(2, b"preempted: nothing to save\n")
  os._exit(errors.EXIT_PREEMPTED)


def help_text() -> str:
  """Returns the text of --help: modes and flags, one line each."""
  values = {"config": "FILE", "workdir": "DIR", "mode": "MODE", "out": "FILE"}
  rows = [
      (f"--{flag.name}={values.get(flag.name, 'VALUE')}", FLAGS[flag.name].help)
      for flag in _FLAGS
  ]
  rows.insert(1, ("--config.section.key=VALUE", "sets a value of the config"))
  return (
      f"{__doc__}\nmodes:\n"
      f"{cli.columns((name, mode.help) for name, mode in MODES.items())}\n\n"
      f"flags:\n{cli.columns(rows)}\n\n"
      "Config keys: bcm_jax/config/schema.py documents most sections; section\n"
      "method takes the fields of its class in bcm_jax/methods/, model those\n"
      "in bcm_jax/models/. --config=FILE --mode=inspect prints every key.\n"
      "--helpfull adds the flags of absl, such as --verbosity."
  )


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; returns the other words, as app.run expects."""
  # Resets the flags, for a second call in a notebook.
  for flag in _FLAGS:
    FLAGS[flag.name].unparse()
  try:
    return FLAGS(argv)
  except flags.Error as e:
    raise errors.UserError(f"{e}; --help lists the flags") from e


def main(argv: list[str] | None = None) -> None:
  """Runs the command; an expected error exits with one line and a status."""
  argv = sys.argv if argv is None else argv
  logging.set_verbosity(logging.WARNING)
  with cli.reporting():
    if "--version" in argv[1:]:
      print(f"bcm_jax {__version__}")
      sys.exit()
    if {"-h", "--help"} & set(argv[1:]):
      print(help_text())
      sys.exit()
    file, overrides, rest = cli.split_overrides(argv[1:])
    app.run(
        lambda words: run(file, overrides, words[1:]), [argv[0], *rest],
        flags_parser=_parse,
    )


if __name__ == "__main__":
  main()
