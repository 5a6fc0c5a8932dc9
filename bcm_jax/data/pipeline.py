"""Stateless input pipeline: a batch is a pure function of (seed, step).

The batch of a step does not depend on restarts or on the number of hosts.
Random numbers are raw words of the Philox generator (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011), keyed by seed, stream name and step
or epoch. NumPy guarantees that raw words are stable between releases, unlike
`Generator.permutation`.
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
# Number of prefetch threads: one batch is read while another is transferred.
_THREADS = 2


def _random_words(seed: int, stream: str, at: int, n: int) -> np.ndarray:
  """Returns random uint64 [n]; word i does not depend on n."""
  if seed < 0:
    raise UserError(f"seed: got {seed}, expected 0 or more; change it")
  key = np.random.SeedSequence(
      int(seed), spawn_key=(zlib.crc32(stream.encode()), int(at))
  )
  return np.random.Philox(key).random_raw(n)


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  """Returns the order of the examples in one epoch.

  Args:
    seed: global seed, >= 0.
    epoch: epoch index, >= 0.
    n: number of examples.

  Returns:
    int64 [n], a permutation of 0 .. n - 1; read-only, because it is cached.

  Raises:
    UserError: the seed is negative.
  """
  order = np.argsort(_random_words(seed, "shuffle", epoch, n), kind="stable")
  order.setflags(write=False)
  return order


def _check_batch_size(batch_size: int, n: int, name: str) -> None:
  if not 1 <= batch_size <= n:
    raise UserError(
        f"batch_size is {batch_size}, expected 1 to {n}, the number of"
        f" examples in {name}; choose a smaller batch_size or another dataset"
    )


def batch_indices(
    seed: int, step: int, batch_size: int, n: int, name: str = "the dataset"
) -> np.ndarray:
  """Returns the example ids of one global batch.

  Step k takes items k * batch_size .. (k + 1) * batch_size - 1 of the
  concatenated epoch permutations. A batch can span two epochs; every epoch
  contains every example exactly once.

  Args:
    seed: global seed, >= 0.
    step: training step, >= 0.
    batch_size: global batch size.
    n: number of examples.
    name: name of the dataset, for the error message.

  Returns:
    int64 [batch_size].

  Raises:
    UserError: the batch size is not in [1, n], or the seed is negative.
  """
  _check_batch_size(batch_size, n, name)
  epoch, start = divmod(int(step) * batch_size, n)
  ids = epoch_permutation(seed, epoch, n)[start : start + batch_size]
  rest = batch_size - len(ids)
  if not rest:
    return ids.copy()
  return np.concatenate([ids, epoch_permutation(seed, epoch + 1, n)[:rest]])


def flip_mask(seed: int, step: int, batch_size: int) -> np.ndarray:
  """Returns bool [batch_size]: True (p = 1/2) flips the image horizontally."""
  return _random_words(seed, "flip", step, batch_size) >> 63 == 1


def host_slice(
    batch: dict[str, np.ndarray], process_index: int, process_count: int
) -> dict[str, np.ndarray]:
  """Returns the contiguous shard of a global batch for one host.

  Args:
    batch: arrays [B, ...].
    process_index: index of this host, 0 .. process_count - 1.
    process_count: number of hosts.

  Returns:
    Arrays [B / process_count, ...].

  Raises:
    UserError: B is not a multiple of process_count.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} of {process_count}")

  def shard(array):
    size, rest = divmod(len(array), process_count)
    if rest:
      raise UserError(
          f"batch_size: got {len(array)}, expected a multiple of the"
          f" {process_count} hosts; change batch_size"
      )
    return array[process_index * size : (process_index + 1) * size]

  return {key: shard(array) for key, array in batch.items()}


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
  """Returns the batch of one step, or the shard of one host.

  Equals `host_slice` of the global batch, but reads only the examples of this
  host.

  Args:
    source: image source.
    seed: global seed, >= 0.
    step: training step, >= 0.
    batch_size: global batch size.
    flip: flip each image horizontally with probability 1/2, keyed by (seed,
      step, position in the global batch).
    process_index: index of this host.
    process_count: number of hosts.

  Returns:
    A dict with B = batch_size / process_count and
      image: uint8 [B, H, W, C]; converted to float on the device, which reduces
        the transfer to a quarter of the bytes.
      label: int32 [B].
      index: int32 [B], position in the global batch, which keys training noise.
      example: int32 [B], example id in the source.
    and any other fields of the source.

  Raises:
    UserError: the batch size is not in [1, len(source)] or not a multiple of
      process_count, the seed is negative, or a label is out of range.
  """
  ids = batch_indices(seed, step, batch_size, len(source), source.name)
  flipped = flip_mask(seed, step, batch_size) & bool(flip)
  shard = host_slice(
      dict(example=ids, index=np.arange(batch_size), flipped=flipped),
      process_index,
      process_count,
  )
  examples = source.fetch(shard["example"])
  check_labels(
      examples["label"], shard["example"], source.num_classes, source.name
  )
  image = examples["image"]
  image[shard["flipped"]] = image[shard["flipped"]][:, :, ::-1]
  return examples | dict(
      image=image,
      label=np.asarray(examples["label"], np.int32),
      index=shard["index"].astype(np.int32),
      example=shard["example"].astype(np.int32),
  )


@dataclasses.dataclass(frozen=True)
class Batches:
  """Callable step -> batch: `get_batch` with all other arguments fixed.

  Attributes:
    source: image source.
    seed: global seed, >= 0.
    batch_size: global batch size.
    flip: random horizontal flips.
    process_index: index of this host.
    process_count: number of hosts.

  Raises:
    UserError: at construction, if batch_size is not in [1, len(source)].
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
  """Yields batches(start), ..., batches(stop - 1), computed in the background.

  Up to two grain threads keep up to `depth` batches ready, in order. They start
  with the first `next` and stop when the iterator is exhausted, closed, garbage
  collected or fails. An exception in `batches(k)` is raised in place of batch
  k.

  Args:
    batches: step -> batch.
    start: first step.
    stop: end of the range of steps (exclusive).
    depth: number of prefetched batches, >= 1.

  Raises:
    UserError: depth is less than 1.
  """
  if depth < 1:
    raise UserError(f"depth: got {depth}, expected 1 or more; raise it")
  return _prefetch(batches, start, stop, depth)


def _prefetch(batches, start, stop, depth):
  # Imported late: grain defines absl flags, which must follow our own.
  import grain

  if start >= stop:
    return
  dataset = grain.MapDataset.range(start, stop).map(batches).to_iter_dataset(
      grain.ReadOptions(
          num_threads=min(depth, _THREADS), prefetch_buffer_size=depth
      )
  )
  iterator = iter(dataset)
  try:
    yield from iterator
  finally:
    iterator.close()
