"""Keyed randomness: seed -> stream name -> step -> position in the batch.

No generator state is stored anywhere, so a restart changes nothing, and no
draw depends on the number of devices or hosts, on jit or on pmap.
"""

import zlib

import jax


def stream_key(seed: int, stream: str) -> jax.Array:
  """Returns the key of a named stream."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))


def step_key(seed: int, stream: str, step: jax.Array | int) -> jax.Array:
  """Returns the key of a step, the same for all examples."""
  return jax.random.fold_in(stream_key(seed, stream), step)


def example_keys(
    seed: int, stream: str, step: jax.Array | int, index: jax.Array
) -> jax.Array:
  """Returns keys [B] of the examples at positions `index` [B] of a step."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
      step_key(seed, stream, step), index
  )
