"""SHA-256 digests of JSON values and arrays."""

from collections.abc import Iterable
import hashlib
import json
from typing import Any

import numpy as np


def json_digest(content: Any) -> str:
  """Returns the hex digest of JSON content, independent of the order of
  keys."""
  return hashlib.sha256(
    json.dumps(content, sort_keys=True).encode()
  ).hexdigest()


def arrays_digest(parts: Iterable[tuple[str, np.ndarray]]) -> str:
  """Returns the hex digest of (header, array) pairs, in order.

  Only the bytes of an array are hashed; dtype and shape belong in its header.
  """
  sha = hashlib.sha256()
  for header, array in parts:
    sha.update(header.encode())
    # A byte view: hashlib does not take bfloat16 buffers, and tobytes copies.
    sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return sha.hexdigest()
