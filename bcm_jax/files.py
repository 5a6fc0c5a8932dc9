"""Files written whole or not at all."""

import io
import json
import os
from typing import Any

import numpy as np


def write_bytes(path: str, content: bytes) -> None:
  """Writes a file, whole or not at all."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path + ".tmp", "wb") as f:
    f.write(content)
  os.replace(path + ".tmp", path)


def write_npz(path: str, **arrays: np.ndarray) -> None:
  """Writes a compressed .npz, whole or not at all."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  write_bytes(path, buffer.getvalue())


def write_json(path: str, content: Any) -> None:
  """Writes indented JSON, whole or not at all."""
  write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
