"""Errors that a user can act on.

The commands turn those below into one line on stderr and an exit status that
launchers understand (docs/reliability.md): 65 (EX_DATAERR) bad input, do not
restart; 74 (EX_IOERR) the machine fails, a restart may help; 75 (EX_TEMPFAIL)
preempted and saved, start again. Anything else is a bug and keeps its
traceback.
"""

from collections.abc import Iterable
import difflib

EXIT_BAD_INPUT = 65
EXIT_HANGING = 70
EXIT_MACHINE = 74
EXIT_PREEMPTED = 75


class UserError(ValueError):
  """What was wrong, what was expected and what to do, in one line."""


class MachineError(RuntimeError):
  """What the machine refuses, such as a full disk, in one line."""


class Preempted(Exception):
  """The run was told to go, and its state is saved; says where, in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns ', did you mean ...?' for the closest known name, or ''."""
  close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
  """Error for a name that is not among the known ones of its kind."""
  known = sorted(known)
  return UserError(
      f"unknown {kind} {name!r}{nearest(name, known)} "
      f"(known: {', '.join(known)})"
  )
