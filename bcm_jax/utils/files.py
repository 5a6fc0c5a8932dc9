"""Files and folders written whole or not at all."""

from collections.abc import Iterator
import contextlib
import io
import json
import os
import shutil
import tempfile
from typing import Any

import numpy as np

from bcm_jax import errors


def write_bytes(path: str, content: bytes) -> None:
  """Writes a file atomically; nothing is left of a write that fails."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  try:
    with open(path + ".tmp", "wb") as f:
      f.write(content)
    os.replace(path + ".tmp", path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(path + ".tmp")
    raise


def write_npz(path: str, **arrays: np.ndarray) -> None:
  """Writes a compressed .npz, whole or not at all."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  write_bytes(path, buffer.getvalue())


def write_json(path: str, content: Any) -> None:
  """Writes indented JSON, whole or not at all."""
  write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def check_free(path: str) -> None:
  """Raises UserError where a file or a folder with something in it is."""
  if os.path.isdir(path) and not os.listdir(path):
    return
  if os.path.lexists(path):
    raise errors.UserError(f"{path} is there already; choose another OUT")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
  """Yields a folder beside `path` that becomes it, or goes if that fails.

  Raises:
    UserError: something is at `path` already, or it cannot be made there.
  """
  check_free(path)
  parent = os.path.dirname(os.path.abspath(path))
  try:
    os.makedirs(parent, exist_ok=True)
    made = tempfile.mkdtemp(prefix=".making-", dir=parent)
  except OSError as e:
    raise errors.UserError(
        f"{path} cannot be made ({e.strerror}); choose another place"
    ) from e
  try:
    yield made
    os.chmod(made, 0o755)
    os.replace(made, path)
  except BaseException:
    shutil.rmtree(made, ignore_errors=True)
    raise
