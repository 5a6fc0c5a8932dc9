"""Atomic writes of files and folders."""

from collections.abc import Iterator
import contextlib
import io
import json
import os
import shutil
import stat
import tempfile
from typing import Any, BinaryIO
import uuid

import numpy as np

from bcm_jax import errors
from bcm_jax.utils import hashing


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Yields a file that replaces `path` at the end; removes it on an error.

  Several processes may replace the same file: each writes its own temporary
  one. It is on the disk before the rename, so that a power failure leaves the
  old or the new content.
  """
  path = os.fspath(path)
  temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
  try:
    with open(temporary, "xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException as e:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      os.remove(temporary)
    if isinstance(e, OSError) and e.errno is not None:
      e.filename = e.filename or path  # A failed write() does not name it.
    raise


def create(path: str | os.PathLike[str], content: bytes) -> None:
  """Creates a file; of several processes that do so only one succeeds.

  Raises:
    FileExistsError: it exists.
  """
  with open(path, "xb") as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    except BaseException:
      os.remove(path)
      raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file atomically, creating its folder."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with replacing(path) as file:
    file.write(content)


def write_npz(path: str, **arrays: np.ndarray) -> None:
  """Writes a compressed .npz atomically."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  write_bytes(path, buffer.getvalue())


def to_json(content: Any) -> bytes:
  """Returns indented JSON."""
  return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Writes indented JSON atomically."""
  write_bytes(path, to_json(content))


def parse_json(text: str | bytes) -> Any:
  """Returns the content of JSON text.

  Raises:
    ValueError: it is not JSON, or nested too deeply.
  """
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError("nested too deeply") from e


def read_json(path: str | os.PathLike[str]) -> Any:
  """Returns the content of a JSON file.

  Raises:
    ValueError: it is not a file, not JSON, or nested too deeply.
    OSError: it cannot be read.
  """
  # A folder cannot be read, and a pipe would block.
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError("not a regular file")
  with open(path, "rb") as file:
    return parse_json(file.read())


def check_free(path: str) -> None:
  """Raises UserError if `path` is a file or a non-empty folder."""
  if os.path.isdir(path) and not os.listdir(path):
    return
  if os.path.lexists(path):
    raise errors.UserError(f"{path} exists already; choose another place")


@contextlib.contextmanager
def new_folder(path: str, overwrite: bool = False) -> Iterator[str]:
  """Yields a folder next to `path` that becomes it; removes it on an error.

  Args:
    path: of the folder.
    overwrite: replace a folder that exists.

  Raises:
    UserError: `path` exists, or cannot be created.
  """
  if not overwrite:
    check_free(path)
  parent = os.path.dirname(os.path.abspath(path))
  try:
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".new-", dir=parent)
  except OSError as e:
    raise errors.UserError(
        f"cannot create {path}: {e.strerror}; choose another place"
    ) from e
  try:
    yield folder
    os.chmod(folder, 0o755)
    if overwrite and os.path.isdir(path) and os.listdir(path):
      old = tempfile.mkdtemp(prefix=".replaced-", dir=parent)
      os.replace(path, old)
      os.replace(folder, path)
      shutil.rmtree(old)
    else:
      os.replace(folder, path)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def keep_other(folder: str, settings: dict[str, Any]) -> None:
  """Prepares a folder for output with these settings; keeps other output.

  A folder with other settings is renamed to FOLDER_DIGEST, of its settings.

  Args:
    folder: folder to write to; its settings.json has the settings.
    settings: JSON values that the output depends on.
  """
  settings = json.loads(json.dumps(settings))

  def kept(of):
    return f"{folder}_{hashing.json_digest(of)[:8]}"

  path = os.path.join(folder, "settings.json")
  old = {}
  with contextlib.suppress(FileNotFoundError, ValueError):
    old = read_json(path)
  if os.path.isdir(folder) and old != settings:
    shutil.rmtree(kept(old), ignore_errors=True)
    os.replace(folder, kept(old))
  if os.path.isdir(kept(settings)):  # Written before the others.
    os.replace(kept(settings), folder)
  write_json(path, settings)
