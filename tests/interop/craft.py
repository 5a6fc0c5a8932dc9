"""Pickles and archives made opcode by opcode, as no honest program does."""

import pathlib
import struct
import zipfile

import numpy as np

from bcm_jax.interop import torch_files

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
VERSION = b"\x80\x02M\xe9\x03."
NOTHING = b"\x80\x02}."


def name(module: str, attribute: str) -> bytes:
  return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
  return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
  return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def blob(content: bytes) -> bytes:
  return b"B" + struct.pack("<I", len(content)) + content


def tuple_of(*parts: bytes) -> bytes:
  return b"(" + b"".join(parts) + b"t"


def dict_of(**items: bytes) -> bytes:
  return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def call(function: bytes, *args: bytes) -> bytes:
  return function + tuple_of(*args) + b"R"


def storage(
    key="0", numel=6, kind="FloatStorage", view: bytes | None = None
) -> bytes:
  """A persistent storage; `view` (b'N' for none) is of the legacy format."""
  parts = [text("storage"), name("torch", kind), text(key), text("cpu")]
  parts += [number(numel)] + ([] if view is None else [view])
  return tuple_of(*parts) + b"Q"


def tensor(of: bytes, offset=0, size=(2, 3), stride=(3, 1)) -> bytes:
  rebuild = name("torch._utils", "_rebuild_tensor_v2")
  sizes = (tuple_of(*map(number, n)) for n in (size, stride))
  return call(rebuild, of, number(offset), *sizes, b"\x89", b"}")


def pickled(body: bytes) -> bytes:
  return b"\x80\x02" + body + b"."


def write_zip(
    path: pathlib.Path, body: bytes, records: dict[str, bytes], **options
) -> str:
  """Writes a zip checkpoint of a pickle and {name: record}."""
  with zipfile.ZipFile(path, "w", **options) as archive:
    archive.writestr("archive/data.pkl", pickled(body))
    for key, content in records.items():
      archive.writestr(f"archive/{key}", content)
  return str(path)


def legacy(body: bytes, keys=(), storages: bytes = b"") -> bytes:
  """Returns a legacy file of a pickle, storage keys and raw storages."""
  listed = b"](" + b"".join(map(text, keys)) + b"e"
  parts = [MAGIC, VERSION, NOTHING, pickled(body), pickled(listed), storages]
  made = b"".join(parts)
  assert torch_files.is_legacy(made[:64])
  return made


def edm(storage_call: bytes) -> bytes:
  """Returns an EDM pickle of a module with one parameter [2, 3]."""
  state = dict_of(_parameters=dict_of(weight=tensor(storage_call)))
  meta = dict_of(
      type=text("class"), class_name=text("Linear"), state=state
  )
  made = call(
      name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta
  )
  return pickled(dict_of(ema=made))


def nested(content: bytes) -> bytes:
  """Returns the call that an EDM pickle makes for a storage."""
  return call(name("torch.storage", "_load_from_bytes"), blob(content))


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> str:
  """Writes a state dict as torch.save does."""
  kinds = {dtype: kind for kind, dtype in torch_files.STORAGES.items()}
  items, records = {}, {}
  for i, (key, array) in enumerate(tensors.items()):
    array = np.asarray(array, order="C")
    stride = [n // array.itemsize for n in array.strides]
    of = storage(str(i), array.size, kinds[array.dtype])
    items[key] = tensor(of, 0, array.shape, stride)
    records[f"data/{i}"] = array.tobytes()
  return write_zip(path, dict_of(**items), records)
