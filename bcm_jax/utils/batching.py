"""Batches of one size."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def padded_batches(arrays: Any, size: int) -> Iterator[tuple[Any, int]]:
  """Yields (batch, number of its rows that are not padding).

  The last batch is padded with copies of its last row, so that one compiled
  function serves all batches.

  Args:
    arrays: tree of arrays [n, ...].
    size: rows of every batch.
  """

  def take(first, array):
    rows = np.asarray(array[first : first + size])
    missing = size - len(rows)
    if not missing:
      return rows
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])

  n = len(jax.tree.leaves(arrays)[0])
  for first in range(0, n, size):
    batch = jax.tree.map(lambda array, first=first: take(first, array), arrays)
    yield batch, min(size, n - first)
