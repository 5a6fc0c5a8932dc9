"""Command-line utilities: flag parsing, error reporting, optional imports."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import importlib
import os
import sys
from typing import Any, NoReturn

from bcm_jax import errors
from bcm_jax.utils import addresses


def split_overrides(
    argv: Sequence[str],
) -> tuple[str | None, dict[str, str], list[str]]:
  """Takes --config and --config.a.b out of a command line.

  Returns:
    (config file or None, {'a.b': text}, the other words).

  Raises:
    UserError: such a flag has no value.
  """
  file, overrides, rest = None, {}, []
  queue = list(argv)
  while queue:
    flag = queue.pop(0)
    name, equals, value = flag.partition("=")
    name = name.lstrip("-") if flag.startswith("-") else ""
    if name != "config" and not name.startswith("config."):
      rest.append(flag)
      continue
    if not equals:
      if not queue:
        raise errors.UserError(f"{flag} needs a value: {flag}=...")
      value = queue.pop(0)
    if name == "config":
      file = value
    else:
      overrides[name.removeprefix("config.")] = value
  return file, overrides, rest


class Parser(argparse.ArgumentParser):
  """Parser of a command's flags; a wrong flag or an address is a UserError.

  Args:
    name: name of the command, or path of a script.
    doc: the module's docstring, shown by --help.
    config: 'file' if the command takes --config=FILE and --config.a.b=VALUE,
      'values' if only the latter; '' for neither. parse_args returns them as
      `config` (None if not given) and `overrides`.
  """

  def __init__(self, name: str, doc: str, config: str = ""):
    super().__init__(
        prog=f"{'python' if name.endswith('.py') else 'bcm_jax'} {name}",
        description=doc, epilog="Defaults are in parentheses.",
        allow_abbrev=False,
        # One line per flag, whatever the width of the terminal.
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30, width=80
        ),
    )
    self._config = config
    # Declared for --help; split_overrides reads them.
    if config == "file":
      self.add_argument("--config", metavar="FILE", help="config file")
    if config:
      self.add_argument("--config.section.key", metavar="VALUE",
                        default=argparse.SUPPRESS,
                        help="sets a value of the config")

  def parse_args(self, args=None, namespace=None):
    """Parses a command line; sys.argv[1:] if args is None."""
    args = sys.argv[1:] if args is None else args
    if not self._config:
      return self._local(super().parse_args(args, namespace))
    file, overrides, rest = split_overrides(args)
    found = self._local(super().parse_args(rest, namespace))
    if file is not None and self._config == "values":
      raise errors.UserError(
          f"--config={file}: this command reads no config file (a run has its "
          "own config); set single values by --config.section.key=value"
      )
    found.config, found.overrides = file, overrides
    return found

  def _local(self, found: argparse.Namespace) -> argparse.Namespace:
    """Checks that no argument is the address of another machine."""
    for action in self._actions:
      values = getattr(found, action.dest, None)
      for value in values if isinstance(values, list) else [values]:
        if isinstance(value, str):
          name = action.option_strings or [action.metavar or action.dest]
          addresses.check_local(name[-1], value)
    return found

  def error(self, message: str):
    """Raises UserError instead of exiting with argparse's status 2."""
    raise errors.UserError(f"{message}; --help lists the flags")


def columns(rows: Iterable[tuple[str, str]]) -> str:
  """Returns a line '  name   text' per row, texts aligned."""
  rows = list(rows)
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
  """Reports expected errors in one line on stderr, with their exit status.

  Also silences TensorFlow's start-up logging, if it is imported inside.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    yield
  except (errors.UserError, errors.MachineError, errors.Preempted) as e:
    _exit(e)
  except OSError as e:
    expected = errors.of_file(e)
    if expected is None:
      raise
    _exit(expected)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr, flush=True)
    # XLA may still compile in a thread, and crashes if the interpreter exits.
    os._exit(errors.EXIT_INTERRUPTED)


def _exit(error: Exception) -> NoReturn:
  """Prints an expected error and exits with its status."""
  word = "preempted" if isinstance(error, errors.Preempted) else "error"
  print(f"{word}: {errors.printable(str(error))}", file=sys.stderr)
  sys.exit(next(
      status for kind, status in errors.STATUS.items()
      if isinstance(error, kind)
  ))


def optional(module: str, what: str, extra: str) -> Any:
  """Imports a library of an extra and returns its top-level module.

  Args:
    module: dotted name; the module before the first dot is returned.
    what: the feature that needs it, for the error.
    extra: extra of this package that installs it.

  Raises:
    UserError: the dependency is not installed.
  """
  name = module.partition(".")[0]
  try:
    package = importlib.import_module(name)
    importlib.import_module(module)
  except ImportError as e:
    raise errors.UserError(
        f"{what}: {name} is not installed; pip install 'bcm_jax[{extra}]'"
    ) from e
  return package


def named_function(key: str, name: str, what: str) -> Callable:
  """Imports a function given as 'module:function'.

  Args:
    key: config key that holds the name, for the error message.
    name: 'module:function', with the module on PYTHONPATH.
    what: signature or purpose of the function, for the error message.

  Raises:
    UserError: the module or the function cannot be imported.
  """
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as e:
    raise errors.UserError(
        f"{key}: {name!r} cannot be imported ({e}), expected 'module:function' "
        f"with a function {what}; correct it or extend PYTHONPATH"
    ) from e
