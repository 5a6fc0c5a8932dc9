"""Keyed randomness: seed -> stream name -> step -> position in the batch.

There is no generator state: random numbers do not depend on restarts, on the
number of devices or hosts, or on jit versus pmap.
"""

import zlib

import jax


def stream_key(seed: int, stream: str) -> jax.Array:
  """Returns the key of a named stream."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))


def step_key(seed: int, stream: str, step: jax.Array | int) -> jax.Array:
  """Returns the key of a stream at a step, shared by all examples."""
  return jax.random.fold_in(stream_key(seed, stream), step)


def example_keys(
    seed: int, stream: str, step: jax.Array | int, index: jax.Array
) -> jax.Array:
  """Returns one key per example.

  Args:
    seed: seed of the run.
    stream: name of the stream.
    step: step of the run.
    index: [B] int32, positions in the global batch.

  Returns:
    Keys [B].
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
      step_key(seed, stream, step), index
  )
