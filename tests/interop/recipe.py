"""Numbers of the fixtures, the same with torch and without it."""

import ml_dtypes
import numpy as np

# Everything that a typed storage of torch holds, by torch's name of it.
DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
}
# Dtypes that torch keeps in storages of bytes.
LATER_DTYPES = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}

# What the embedded source of the EDM fixtures would leave behind.
TRACE = "the_embedded_source_was_executed"
MODULE_SOURCE = f"""
import pathlib
pathlib.Path({TRACE!r}).write_text("executed")
raise RuntimeError("the embedded source was executed")
"""


def numbers(seed: int, *shape: int) -> np.ndarray:
  """Returns float64 multiples of 1/2 in [0, 8), exact in every dtype above."""
  whole = np.random.default_rng(seed).integers(0, 16, shape)
  return whole / 2


def of_dtype(name: str) -> np.ndarray:
  """Returns the numbers [2, 3] of a dtype, as a fixture holds them."""
  dtype = (DTYPES | LATER_DTYPES)[name]
  seed = sorted(DTYPES | LATER_DTYPES).index(name)
  values = numbers(seed, 2, 3)
  if np.dtype(dtype).kind in "iub":
    values = np.floor(values)
  # An imaginary part tells a complex number from two swapped halves.
  values = values + 1j if dtype == np.complex64 else values
  return values.astype(dtype)


def state_dict() -> dict[str, np.ndarray]:
  """Returns what the fixtures torch_zip.pt and torch_legacy.pt hold."""
  base = numbers(100, 4, 6).astype(np.float32)
  return {
      **{f"dtype.{name}": of_dtype(name) for name in DTYPES},
      "base": base,
      "transposed": base.T,
      "sliced": base[1:3, ::2],
      "last": base.reshape(-1)[20:],
      "shared": base,
      "scalar": np.float32(numbers(101)),
      "expanded": np.broadcast_to(np.float32(numbers(102, 3)), (5, 3)),
      "empty": np.zeros((0, 3), np.float32),
      "parameter": numbers(103, 3).astype(np.float32),
      "with_attributes": numbers(104, 3).astype(np.float16),
  }


def network(dtype=np.float32) -> dict[str, np.ndarray]:
  """Returns what the EDM fixtures hold under 'ema', by dotted names."""
  return {
      "model.conv.weight": numbers(200, 4, 3, 3, 3).astype(dtype),
      "model.conv.bias": numbers(201, 4).astype(dtype),
      "model.conv.resample_filter": numbers(202, 1, 1, 2, 2).astype(dtype),
      "model.gain": np.asarray(numbers(203)).astype(dtype),
      "model.norm.weight": np.ones(4, dtype),
      "model.norm.bias": np.zeros(4, dtype),
  }
