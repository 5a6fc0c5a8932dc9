"""What all commands share: foreseen ends are one line and an exit status."""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import importlib
import os
import sys
from typing import Any

from bcm_jax import errors


class Parser(argparse.ArgumentParser):
  """Describes a module's command by its docstring; wrong flags are UserErrors.

  Args:
    module: dotted name, as in python -m NAME, or path of a script.
    doc: the module's docstring, shown by --help.
  """

  def __init__(self, module: str, doc: str):
    script = module.endswith(".py")
    super().__init__(
        prog=f"python {module}" if script else f"python -m {module}",
        description=doc, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

  def error(self, message: str):
    """Reports a wrong flag as any other bad input."""
    raise errors.UserError(f"{message}; --help lists the flags")


@contextlib.contextmanager
def reporting() -> Iterator[None]:
  """Turns what was foreseen into one line on stderr and its exit status."""
  try:
    yield
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(errors.EXIT_BAD_INPUT)
  except errors.MachineError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(errors.EXIT_MACHINE)
  except errors.Preempted as e:
    print(f"preempted: {e}", file=sys.stderr)
    sys.exit(errors.EXIT_PREEMPTED)


def quiet_tensorflow() -> None:
  """TensorFlow's start-up chatter is no news to anybody."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def optional(module: str, what: str, extra: str) -> Any:
  """A library that is an extra, imported by those who need it.

  Args:
    module: its dotted name; what is before the first dot is returned.
    what: that needs it, for the error.
    extra: of this package, that installs it.

  Raises:
    UserError: it is not installed.
  """
  name = module.partition(".")[0]
  try:
    found = importlib.import_module(name)
    importlib.import_module(module)
  except ImportError as e:
    raise errors.UserError(
        f"{what} needs {name}; install it: pip install 'bcm_jax[{extra}]'"
    ) from e
  return found


def named_function(key: str, name: str, what: str) -> Callable:
  """The function that a user names as 'module:function'.

  Args:
    key: of the config, for the error.
    name: the module must be on PYTHONPATH.
    what: what the function must be, for the error.

  Raises:
    UserError: it cannot be imported.
  """
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as e:
    raise errors.UserError(
        f"{key}={name!r} cannot be imported ({e}); give a module on PYTHONPATH "
        f"and a function {what} in it"
    ) from e
