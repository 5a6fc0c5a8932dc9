"""Expected errors and the exit status of each.

Commands report these errors as one line on stderr, without a traceback, and
exit with a status from sysexits.h (docs/reliability.md): 65 (EX_DATAERR) for
bad input, which a restart cannot repair; 74 (EX_IOERR) for an environment
failure, where a restart may help; 75 (EX_TEMPFAIL) after a preemption with a
saved checkpoint, to be restarted. Any other exception is a bug and keeps its
traceback.
"""

from collections.abc import Iterable
import difflib
import errno

EXIT_BAD_INPUT = 65
EXIT_HANGING = 70
EXIT_MACHINE = 74
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as of a shell.


class UserError(ValueError):
  """Bad input, reported as one line: `key: got X, expected Y; fix`."""


class MachineError(RuntimeError):
  """Environment failure (for example a full disk), reported in one line."""


class Preempted(Exception):
  """Preemption after a checkpoint was saved; the message names the checkpoint.
  """


def printable(name: str) -> str:
  """Returns a file name with line breaks and other control bytes escaped."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


# Kind of error -> exit status.
STATUS = {
    UserError: EXIT_BAD_INPUT,
    MachineError: EXIT_MACHINE,
    Preempted: EXIT_PREEMPTED,
}
# Errors of files that the machine causes; a restart may help, also elsewhere.
_MACHINE = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO,
    errno.ESTALE, errno.ENODEV, errno.ENXIO,
})
# Errors of what a user put in a place, or of its permissions.
_PLACE = frozenset({
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG,
})


def of_file(error: OSError) -> UserError | MachineError | None:
  """Returns the expected error for a failed access of a file, or None.

  None is for errors that may be a bug, such as a missing file.
  """
  place = f"{error.filename}: " if error.filename else ""
  if error.errno in _MACHINE:
    return MachineError(
        f"{place}{error.strerror}; free space or repair the disk, then run the "
        "same command again"
    )
  if error.errno in _PLACE:
    return UserError(
        f"{place}{error.strerror}, expected to read or write there; change the "
        "permissions, move what is in the way, or choose another folder"
    )
  return None


def outdated(path: object) -> UserError:
  """Returns the error for a file or folder of the first version's format."""
  return UserError(
      f"{path}: written by an earlier version of bcm_jax; run bcm_jax "
      "migrate OLD NEW"
  )


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns '; did you mean ...?' with the closest known name, or ''."""
  close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
  """Returns the error for a name that is not in a list of known names.

  Args:
    kind: config key or flag, or a noun ('sampler'), that starts the message.
    name: the value that was passed.
    known: the accepted values.
  """
  known = sorted(known)
  return UserError(
      f"{kind}: got {name!r}, expected one of {', '.join(known)}"
      f"{nearest(name, known)}"
  )
