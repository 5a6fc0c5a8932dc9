"""PyTorch's containers, new (zip) and legacy, read without torch.

Formats: `torch.serialization` of torch 2; the legacy one is what torch.save
wrote before 1.6, and still does for _use_new_zipfile_serialization=False.
"""

from typing import Any, BinaryIO
import zipfile

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import pickle_machine
from bcm_jax.interop.cursor import Cursor
from bcm_jax.interop.pickle_machine import Known
from bcm_jax.interop.pickle_machine import shown
from bcm_jax.interop.torch_pickle import lookup
from bcm_jax.interop.torch_pickle import Storage

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# What zipfile raises for archives that are damaged in one way or another.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OSError),
    OverflowError,
)


def is_legacy(head: bytes) -> bool:
  """Whether a file that starts with `head` is of torch's legacy format."""
  return head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:40]


def read_zip(file: BinaryIO) -> Any:
  """Reads a file of torch.save.

  Args:
    file: seekable, a zip archive.

  Returns:
    the saved object: a tree of dicts, lists, `torch_pickle.Tensor` (whose
    storages are filled), `Module` and plain values.

  Raises:
    UserError: an archive that is damaged, cut short, compressed or no
      checkpoint, or a pickle that is refused.
  """
  try:
    archive = zipfile.ZipFile(file)
  except _ZIP_ERRORS as e:
    raise _damaged(e) from None
  with archive:
    return _Archive(archive).load()


def _damaged(error: Exception) -> UserError:
  return UserError(
      f"the zip archive is damaged or cut short ({error}); copy or download it"
      " again"
  )


class _Archive:
  """A zip archive and the storages read from it so far."""

  def __init__(self, archive: zipfile.ZipFile):
    self.archive = archive
    self.infos = {info.filename: info for info in archive.infolist()}
    self.storages: dict[str, Storage] = {}
    archive.fp.seek(0, 2)
    self.bytes_left = archive.fp.tell()
    pickles = [
        name
        for name in self.infos
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
      raise UserError(
          f"the zip archive holds {len(pickles)} records */data.pkl, expected"
          " one, as torch.save writes; give a file of torch.save"
      )
    self.folder = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(self.folder + "code/") for name in self.infos):
      raise UserError(
          "the file is TorchScript, which is code; save the model's"
          " state_dict() with torch.save instead"
      )
    self.big_endian = self._is_big_endian()

  def _is_big_endian(self) -> bool:
    if self.folder + "byteorder" not in self.infos:
      return False  # Before torch 2.1.
    order = self.record("byteorder").strip()
    if order not in (b"little", b"big"):
      raise UserError(
          f"the record byteorder is {shown(order)}, expected little or big; the"
          " file is damaged"
      )
    return order == b"big"

  def record(self, name: str) -> bytes:
    """Returns a record's bytes, whose checksum has been verified."""
    info = self.infos.get(self.folder + name)
    if info is None:
      raise UserError(
          f"the file lacks the record {shown(name)}; copy or download it again"
      )
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise UserError(
          f"the record {shown(name)} is compressed or encrypted, which"
          " torch.save never does; the file is refused"
      )
    # Records that overlap could ask for far more memory than the file has.
    self.bytes_left -= info.file_size
    if self.bytes_left < 0:
      raise UserError("the zip archive declares more bytes than it has")
    try:
      return self.archive.read(info)
    except _ZIP_ERRORS as e:
      raise _damaged(e) from None

  def storage(self, pid: Any) -> Storage:
    """Returns the storage of a persistent id."""
    made = _declared(pid, 5)
    key = made.key
    if key not in self.storages:
      made.fill(self.record(f"data/{key}"), self.big_endian)
      self.storages[key] = made
    return _same(self.storages[key], made)

  def load(self) -> Any:
    cursor = Cursor(self.record("data.pkl"))
    return pickle_machine.load(cursor, lookup(), self.storage)


def _declared(pid: Any, length: int) -> Storage:
  """Returns what a persistent id ('storage', type, key, place, n) declares."""
  if type(pid) is tuple and len(pid) == length and pid[0] == "storage":
    _, kind, key, _, numel = pid[:5]
    if (
        isinstance(kind, Known)
        and isinstance(kind.value, np.dtype)
        and type(key) is str
        and type(numel) is int
        and 0 <= numel < 1 << 60
    ):
      return Storage(key, kind.value, numel)
  raise UserError(
      "the pickle refers to something else than a storage; the file is refused"
  )


def _same(first: Storage, again: Storage) -> Storage:
  if (first.dtype, first.numel) != (again.dtype, again.numel):
    raise UserError(
        f"storage {shown(first.key)} is declared twice and differently; the"
        " file is damaged"
    )
  return first


class _Legacy:
  """The storages that a legacy pickle declares before they come."""

  def __init__(self):
    self.storages: dict[str, Storage] = {}
    self.views: dict[tuple[str, str], Storage] = {}

  def persistent(self, pid: Any) -> Any:
    """Returns the storage, or the class of a whole module."""
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
      return pid[1]
    made = _declared(pid, 6)
    root = _same(self.storages.setdefault(made.key, made), made)
    return root if pid[5] is None else self._view(root, pid[5])

  def _view(self, root: Storage, view: Any) -> Storage:
    # A part of another storage, as torch 0.3 and older wrote it.
    if type(view) is not tuple or len(view) != 3 or type(view[0]) is not str:
      raise UserError(f"storage {shown(root.key)} has a malformed view")
    key, start, numel = view
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in (start, numel)):
      raise UserError(f"storage {shown(root.key)} has a malformed view")
    made = Storage(key, root.dtype, numel, root=root, start=start)
    return self.views.setdefault((root.key, key), made)

  def fill(self, cursor: Cursor, keys: Any) -> None:
    """Reads the records of the keys, in their order."""
    if type(keys) is not list:
      raise UserError("the file's list of storages is malformed")
    for key in keys:
      if type(key) is not str or key not in self.storages:
        raise UserError(f"the file has a storage {shown(key)} of no tensor")
      storage = self.storages[key]
      numel = cursor.unpack("<q")
      if numel != storage.numel:
        raise UserError(
            f"storage {shown(key)} has {numel} numbers, but the pickle"
            f" declares {storage.numel}; the file is damaged"
        )
      # Always little-endian, whatever the machine that wrote them.
      size = numel * storage.dtype.itemsize
      storage.fill(bytes(cursor.take(size)))


def read_legacy(content: bytes) -> Any:
  """Reads a file of torch.save(..., _use_new_zipfile_serialization=False).

  Args:
    content: of the whole file.

  Returns:
    as `read_zip`.

  Raises:
    UserError: as `read_zip`.
  """
  cursor = Cursor(content)
  names = lookup()
  for what, expected in (("magic number", _MAGIC), ("version", _PROTOCOL)):
    found = pickle_machine.load(cursor, names)
    if type(found) is not int or found != expected:
      raise UserError(
          f"the {what} is {shown(found)}, expected {expected}; give a file of"
          " torch.save"
      )
  pickle_machine.load(cursor, names)  # Sizes of C's types at that time.
  legacy = _Legacy()
  tree = pickle_machine.load(cursor, names, legacy.persistent)
  legacy.fill(cursor, pickle_machine.load(cursor, names))
  return tree


def read_storage(content: Any) -> Storage:
  """Reads the storage that a plain pickle nests as a legacy file.

  Args:
    content: bytes that `torch.storage._load_from_bytes` would be given.

  Raises:
    UserError: as `read_zip`, or the content is no storage.
  """
  if type(content) is not bytes or not is_legacy(content[:64]):
    raise UserError("the pickle nests something else than a storage; refused")
  storage = read_legacy(content)
  if not isinstance(storage, Storage):
    raise UserError("the pickle nests something else than a storage; refused")
  return storage
