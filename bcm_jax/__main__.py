"""The command bcm_jax, or python -m bcm_jax: every command by its short name.

  bcm_jax COMMAND [FLAGS]      such as: bcm_jax sample --workdir=runs/digits
  bcm_jax COMMAND --help       lists the flags of the command
  bcm_jax --version            prints the version
"""

import importlib
import sys

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax import main
from bcm_jax.utils import cli

# Name -> (one line of help, module whose main runs it). The modes of main are
# commands, too.
COMMANDS = {
    "prepare": ("write images as a data set that loads fast",
                "bcm_jax.data.prepare"),
    "convert": ("convert published weights to a work directory, or back",
                "bcm_jax.generate.convert"),
    "plots": ("draw training curves, quality over NFE and trajectories",
              "bcm_jax.plots.draw"),
    "studio": ("sample and edit in the browser", "bcm_jax.studio.app"),
    "hub": ("share models on the Hugging Face Hub", "bcm_jax.export.hub"),
    "export": ("export samplers as StableHLO", "bcm_jax.export.stablehlo"),
    "train_classifier": ("train a classifier whose features metrics use",
                         "bcm_jax.tools.train_classifier"),
    "migrate": ("rewrite a run or model folder of the first version",
                "bcm_jax.tools.migrate"),
}


def help_text() -> str:
  """Returns the list of commands, one line each."""
  modes = [(name, mode.help) for name, mode in main.MODES.items()]
  others = [(name, text) for name, (text, _) in COMMANDS.items()]
  return f"{__doc__}\ncommands:\n{cli.columns([*modes, *others])}"


def run(argv: list[str] | None = None) -> None:
  """Entry point of the console script; argv without the program's name.

  `bcm_jax MODE FLAGS` is `python -m bcm_jax.main --mode=MODE FLAGS`.
  """
  argv = sys.argv[1:] if argv is None else argv
  name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
  with cli.reporting():
    if name in ("-h", "--help"):
      print(help_text())
    elif name == "--version":
      print(f"bcm_jax {__version__}")
    elif name in main.MODES:
      for word in rest:
        if word.lstrip("-").partition("=")[0] == "mode" and word[0] == "-":
          raise errors.UserError(
              f"--mode: got {word} after {name}, which is the mode; remove one"
          )
      main.main(["bcm_jax", f"--mode={name}", *rest])
    elif name in COMMANDS:
      importlib.import_module(COMMANDS[name][1]).main(rest)
    else:
      raise errors.unknown_name("command", name, [*main.MODES, *COMMANDS])


if __name__ == "__main__":
  run()
