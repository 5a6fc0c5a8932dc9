"""What may happen to a folder of files that a run left."""

import os
import pathlib


def files(folder: os.PathLike | str) -> list[pathlib.Path]:
  """All files in a folder and below."""
  return [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]


def largest(folder: os.PathLike | str) -> pathlib.Path:
  """The largest file: of a checkpoint, one that holds tensors."""
  return max(files(folder), key=lambda p: p.stat().st_size)


def truncate(folder: os.PathLike | str) -> None:
  """The largest file loses its second half."""
  path = largest(folder)
  os.truncate(path, path.stat().st_size // 2)


def flip_bit(folder: os.PathLike | str) -> None:
  """One bit in the largest file changes."""
  path = largest(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 4
  path.write_bytes(data)


def zero(folder: os.PathLike | str) -> None:
  """The largest file keeps its length alone."""
  path = largest(folder)
  path.write_bytes(bytes(path.stat().st_size))


def delete_file(folder: os.PathLike | str) -> None:
  """The largest file is gone."""
  largest(folder).unlink()
