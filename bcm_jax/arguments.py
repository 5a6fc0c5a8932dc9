"""The flags of main.py, read from a command line."""

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from bcm_jax import errors

MODES = ("train", "sample", "invert", "edit", "eval", "search", "reference",
         "table", "inspect", "compile", "pairs")
# What needs no directory of a run.
_WITHOUT_WORKDIR = ("inspect", "compile")

_DEFINED = (
    flags.DEFINE_string("workdir", None, "Directory of the run."),
    flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}."),
    flags.DEFINE_string("compare", None, "Mode inspect: a second run."),
    flags.DEFINE_string(
        "topology", None, "Mode compile: TPUs to compile for, as v5e:16x16."
    ),
    flags.DEFINE_string(
        "out", None, "Mode compile: file of the report; default is to print it."
    ),
    flags.DEFINE_string(
        "coordinator", None,
        "host:port of process 0, where JAX finds no cluster by itself.",
    ),
    flags.DEFINE_integer(
        "num_processes", None, "Processes of the run; with --coordinator."
    ),
    flags.DEFINE_integer(
        "process_id", None, "Number of this process; with --coordinator."
    ),
)
# Read before absl parses; declared so that --help shows it.
flags.DEFINE_string(
    "config", None, "Config file; --config.section.key=value sets a value."
)


class Arguments(NamedTuple):
  """What the command line says beside the config; the flags' help tells more.
  """

  workdir: str | None
  mode: str
  compare: str | None
  topology: str | None
  out: str | None
  coordinator: str | None
  num_processes: int | None
  process_id: int | None

  def check(self) -> None:
    """Raises UserError for a mode that is none, or lacks what it needs."""
    if self.mode not in MODES:
      raise errors.unknown_name("--mode", self.mode, MODES)
    if self.workdir is None and self.mode not in _WITHOUT_WORKDIR:
      raise errors.UserError(
          f"--workdir is missing; mode {self.mode} needs one"
      )


def parse(argv: Sequence[str]) -> list[str]:
  """absl's parser, with errors of ours; returns what is no flag."""
  # A second call, as from a notebook, starts from the defaults again.
  for flag in _DEFINED:
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


def values() -> Arguments:
  """The values of the flags, once parsed."""
  return Arguments(*(flag.value for flag in _DEFINED))
