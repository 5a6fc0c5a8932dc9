"""Bytes read one after the other, never beyond their end."""

import struct
from typing import Any

from bcm_jax.errors import UserError

CUT = "the file ends early or is damaged; copy or download it again"


class Cursor:
  """A place in bytes.

  Attributes:
    position: of the next byte.
  """

  def __init__(self, content: bytes, position: int = 0):
    self._content = memoryview(content)
    self.position = position

  def __len__(self) -> int:
    return len(self._content)

  def byte(self) -> int:
    """Returns the next byte; UserError at the end."""
    if self.position >= len(self._content):
      raise UserError(CUT)
    self.position += 1
    return self._content[self.position - 1]

  def take(self, count: int) -> memoryview:
    """Returns the next `count` bytes; UserError if there are fewer."""
    end = self.position + count
    if count < 0 or end > len(self._content):
      raise UserError(CUT)
    taken = self._content[self.position : end]
    self.position = end
    return taken

  def unpack(self, form: str) -> Any:
    """Returns one number in a format of `struct`."""
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def line(self) -> str:
    """Returns the text up to an end of line; UserError if none is near."""
    text = bytes(self._content[self.position : self.position + 1024])
    end = text.find(b"\n")
    if end < 0:
      raise UserError(CUT)
    self.position += end + 1
    return text[:end].decode("latin-1")
