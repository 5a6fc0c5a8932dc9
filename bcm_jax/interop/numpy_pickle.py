"""NumPy arrays and scalars of plain numbers, as a pickle describes them."""

import math
import re
from typing import Any

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop.pickle_machine import Known
from bcm_jax.interop.pickle_machine import shown
from bcm_jax.interop.pickle_machine import Stub

_NUMBERS = {
    *("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
    *("f2", "f4", "f8", "c8", "c16"),
}


class Dtype(Stub):
  """The dtype of plain numbers."""

  def __init__(self, code: Any, *_: Any):
    text = code if type(code) is str else ""
    match = re.fullmatch(r"[<>|=]?([a-z][0-9]{1,2})", text)
    if not match or match[1] not in _NUMBERS:
      raise UserError(
          f"the pickle holds a NumPy array of {shown(code)}, expected plain"
          " numbers; the file is refused"
      )
    self.value = np.dtype(match[1])

  def build(self, state: Any) -> None:
    """Takes (version, byte order, and nothing of a compound dtype)."""
    if (
        type(state) is not tuple
        or len(state) < 5
        or state[1] not in ("<", ">", "=", "|")
        or state[2:5] != (None, None, None)
    ):
      raise UserError("the pickle holds a compound NumPy dtype; refused")
    if state[1] == ">":
      self.value = self.value.newbyteorder(">")


class Array(Stub):
  """An array whose numbers come with its state.

  Attributes:
    value: the array, None until it is built.
  """

  value: np.ndarray | None = None

  def build(self, state: Any) -> None:
    """Takes (version, shape, dtype, is it in Fortran order, raw bytes)."""
    if type(state) is not tuple or len(state) != 5:
      raise UserError("the pickle holds a NumPy array without its numbers")
    _, shape, dtype, fortran, raw = state
    self.value = _numbers(raw, dtype, shape, "F" if fortran else "C")


def _numbers(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
  if type(raw) is str:
    raw = encode(raw, "latin1")
  if type(shape) is not tuple or not all(type(n) is int for n in shape):
    raise UserError(f"the pickle holds an array of shape {shown(shape)}")
  if not isinstance(dtype, Dtype) or type(raw) is not bytes:
    raise UserError("the pickle holds a NumPy array of something else")
  needed = math.prod(shape) * dtype.value.itemsize
  if len(shape) > 32 or min(shape, default=0) < 0 or needed != len(raw):
    raise UserError(
        f"the pickle holds a NumPy array of shape {shown(shape)} with"
        f" {len(raw)} bytes, expected {shown(needed)}; the file is damaged"
    )
  flat = np.frombuffer(raw, dtype.value)
  flat = flat.astype(dtype.value.newbyteorder("="), copy=False)
  return flat.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, raw: Any) -> np.generic:
  return _numbers(raw, dtype, (1,), "C")[0]


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
  made = Array()
  made.value = _numbers(raw, dtype, shape, order)
  return made


def encode(text: Any, encoding: Any = None) -> bytes:
  """Returns the bytes that protocol 2 wrote as Latin-1 text."""
  if type(text) is not str or encoding not in ("latin1", "latin-1"):
    raise UserError("the pickle encodes something else than bytes; refused")
  return text.encode("latin-1")


def known() -> dict[str, Known]:
  """Returns the globals of NumPy pickles, by dotted name."""
  found = [
      Known("_codecs.encode", encode),
      Known("numpy.dtype", Dtype),
      Known("numpy.ndarray"),
  ]
  for core in ("numpy.core", "numpy._core"):
    found += [
        Known(f"{core}.multiarray._reconstruct", lambda *_: Array()),
        Known(f"{core}.multiarray.scalar", _scalar),
        Known(f"{core}.numeric._frombuffer", _from_buffer),
    ]
  return {each.name: each for each in found}
