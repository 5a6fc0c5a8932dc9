"""Addresses with a scheme, such as gs://BUCKET, which no command reads yet."""

import os
import re

from bcm_jax import errors

# A scheme of two letters or more, so that C:/ is a path.
_SCHEME = re.compile(r"\s*[A-Za-z][\w+.-]+:/")
LOCAL = (
    "a path on this machine; gs:// and other addresses are not supported, copy "
    "the files first"
)


def is_address(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path starts with a scheme, as in gs://BUCKET or gs:/x."""
  return _SCHEME.match(os.fspath(path)) is not None


def check_local(name: str, path: str | os.PathLike[str]) -> None:
  """Raises UserError if `path`, the value of flag or key `name`, is an address.
  """
  if is_address(path):
    raise errors.UserError(f"{name}: got {os.fspath(path)!r}, expected {LOCAL}")
