"""Batches as a pure function of (seed, step).

Nothing here has a state: batch 1,000 after a restart, on another number of
hosts or computed twice is the same batch. Random numbers are raw Philox words
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) keyed by
seed, stream name and step or epoch; NumPy keeps raw words stable between its
releases, which it does not promise for `Generator.permutation`.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import TypeVar
import zlib

import numpy as np

from bcm_jax.data.image_source import check_labels
from bcm_jax.data.image_source import Source
from bcm_jax.errors import UserError

T = TypeVar("T")
# Batches made at a time: one is being copied to devices while one is read.
_THREADS = 2


def _random_words(seed: int, stream: str, at: int, n: int) -> np.ndarray:
  """Returns uint64 [n]; word i does not depend on n."""
  if seed < 0:
    raise UserError(f"seed is {seed}, expected 0 or more; choose another seed")
  key = np.random.SeedSequence(
      int(seed), spawn_key=(zlib.crc32(stream.encode()), int(at))
  )
  return np.random.Philox(key).random_raw(n)


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  """Returns the order of the examples in one epoch.

  Args:
    seed: >= 0.
    epoch: >= 0.
    n: number of examples.

  Returns:
    int64 [n], a permutation of 0 .. n - 1; read-only, for it is cached.

  Raises:
    UserError: the seed is negative.
  """
  order = np.argsort(_random_words(seed, "shuffle", epoch, n), kind="stable")
  order.setflags(write=False)
  return order


def _check_batch_size(batch_size: int, n: int, name: str) -> None:
  if not 1 <= batch_size <= n:
    raise UserError(
        f"batch_size is {batch_size}, expected 1 to {n}, the number of examples"
        f" in {name}; choose a smaller batch_size or another data set"
    )


def batch_indices(
    seed: int, step: int, batch_size: int, n: int, name: str = "the data set"
) -> np.ndarray:
  """Returns the example ids of one global batch.

  Step k takes items k * batch_size .. (k + 1) * batch_size - 1 of the endless
  row of epoch permutations. A batch may end one epoch and begin the next;
  every epoch visits every example exactly once.

  Args:
    seed: >= 0.
    step: >= 0.
    batch_size: of the global batch.
    n: number of examples.
    name: of the data set, for the error message.

  Returns:
    int64 [batch_size].

  Raises:
    UserError: batch_size is not in [1, n], or the seed is negative.
  """
  _check_batch_size(batch_size, n, name)
  epoch, start = divmod(int(step) * batch_size, n)
  ids = epoch_permutation(seed, epoch, n)[start : start + batch_size]
  rest = batch_size - len(ids)
  if not rest:
    return ids.copy()
  return np.concatenate([ids, epoch_permutation(seed, epoch + 1, n)[:rest]])


def flip_mask(seed: int, step: int, batch_size: int) -> np.ndarray:
  """Returns bool [batch_size], whether each position is mirrored (p = 1/2)."""
  return _random_words(seed, "flip", step, batch_size) >> 63 == 1


def host_slice(
    batch: dict[str, np.ndarray], process_index: int, process_count: int
) -> dict[str, np.ndarray]:
  """Returns the contiguous part of a global batch that one host holds.

  Args:
    batch: arrays [B, ...].
    process_index: of this host, 0 .. process_count - 1.
    process_count: number of hosts.

  Returns:
    arrays [B / process_count, ...].

  Raises:
    UserError: B is not a multiple of process_count.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} of {process_count}")

  def part(array):
    size, rest = divmod(len(array), process_count)
    if rest:
      raise UserError(
          f"batch_size is {len(array)}, expected a multiple of the"
          f" {process_count} hosts; change batch_size"
      )
    return array[process_index * size : (process_index + 1) * size]

  return {key: part(array) for key, array in batch.items()}


def get_batch(
    source: Source,
    seed: int,
    step: int,
    batch_size: int,
    flip: bool = False,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, np.ndarray]:
  """Returns the batch of one step, or one host's part of it.

  With B = batch_size / process_count, the result equals `host_slice` of the
  global batch, but only this host's examples are read.

  Args:
    source: where the examples come from.
    seed: >= 0.
    step: >= 0.
    batch_size: of the global batch.
    flip: mirror each image left to right with probability 1/2, keyed by
      (seed, step, position in the global batch).
    process_index: of this host.
    process_count: number of hosts.

  Returns:
    image uint8 [B, H, W, C], which the devices turn into floats (a quarter of
    the bytes to carry there); label int32 [B]; index int32 [B], the position in
    the global batch, by which training noise is keyed; example int32 [B], the
    example id in the source; and what else the source brings.

  Raises:
    UserError: batch_size not in [1, len(source)] or not a multiple of
      process_count, a negative seed, or a label out of range.
  """
  ids = batch_indices(seed, step, batch_size, len(source), source.name)
  mirrored = flip_mask(seed, step, batch_size) & bool(flip)
  part = host_slice(
      dict(example=ids, index=np.arange(batch_size), mirrored=mirrored),
      process_index,
      process_count,
  )
  fetched = source.fetch(part["example"])
  check_labels(
      fetched["label"], part["example"], source.num_classes, source.name
  )
  image = fetched["image"]
  image[part["mirrored"]] = image[part["mirrored"]][:, :, ::-1]
  return fetched | dict(
      image=image,
      label=np.asarray(fetched["label"], np.int32),
      index=part["index"].astype(np.int32),
      example=part["example"].astype(np.int32),
  )


@dataclasses.dataclass(frozen=True)
class Batches:
  """`get_batch` with everything but the step filled in.

  Attributes:
    source: where the examples come from.
    seed: >= 0.
    batch_size: of the global batch.
    flip: random left-right mirroring.
    process_index: of this host.
    process_count: number of hosts.

  Raises:
    UserError: on making it, if batch_size is not in [1, len(source)].
  """

  source: Source
  seed: int
  batch_size: int
  flip: bool = False
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    _check_batch_size(self.batch_size, len(self.source), self.source.name)

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Returns the batch of this step; see `get_batch`."""
    return get_batch(
        self.source,
        self.seed,
        step,
        self.batch_size,
        self.flip,
        process_index=self.process_index,
        process_count=self.process_count,
    )


def prefetch(
    batches: Callable[[int], T], start: int, stop: int, depth: int = 2
) -> Iterator[T]:
  """Yields batches(start), ..., batches(stop - 1), computed ahead.

  Up to two background threads of grain's, started by the first `next` and ended
  with the iterator (when exhausted, closed, collected or failed), keep up to
  `depth` batches ready, in order. An exception in `batches(k)` is raised where
  batch k would have been yielded.

  Args:
    batches: maps a step to its batch.
    start: first step.
    stop: one past the last step.
    depth: batches computed ahead, >= 1.

  Raises:
    UserError: depth is less than 1.
  """
  if depth < 1:
    raise UserError(f"prefetch depth is {depth}, expected 1 or more; raise it")
  return _prefetch(batches, start, stop, depth)


def _prefetch(batches, start, stop, depth):
  # Imported late: it defines flags, which must wait for those of the command.
  import grain

  if start >= stop:
    return
  ahead = grain.MapDataset.range(start, stop).map(batches).to_iter_dataset(
      grain.ReadOptions(
          num_threads=min(depth, _THREADS), prefetch_buffer_size=depth
      )
  )
  iterator = iter(ahead)
  try:
    yield from iterator
  finally:
    iterator.close()
