"""Damaged and hostile sizes give a UserError: no crash, hang or bomb."""

import io
import pathlib
import re
import struct
import time
import tracemalloc
import zipfile
import zlib

import flax.serialization
import numpy as np
import pytest
import safetensors.numpy

from bcm_jax.errors import UserError
from bcm_jax.interop import trees
from bcm_jax.interop import weight_files
from tests.interop import craft
from tests.interop import recipe
from tests.interop.craft import call
from tests.interop.craft import name
from tests.interop.craft import number
from tests.interop.craft import storage
from tests.interop.craft import tensor
from tests.interop.craft import text

FILES = sorted((pathlib.Path(__file__).parent / "files").glob("*.p*"))


def _flax() -> bytes:
  params = {"Conv_0": {"kernel": recipe.numbers(1, 3, 3), "b": np.ones(2)}}
  return flax.serialization.to_bytes(dict(step=3, params=params))


def _safetensors() -> bytes:
  return safetensors.numpy.save({"a": np.ones(3), "b": np.ones((2, 2), "f4")})


CONTENTS = {path.name: path.read_bytes for path in FILES} | dict(
    flax=_flax, safetensors=_safetensors
)


def error_of(path: str, traced: bool = True) -> str:
  """Returns the UserError of a read that must be quick and small."""
  # Tracing makes long pickles many times slower.
  if traced:
    tracemalloc.start()
  start = time.process_time()
  try:
    with pytest.raises(UserError) as error:
      weight_files.read(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert time.process_time() - start < 5 and peak < 64 << 20
  message = str(error.value)
  assert message.startswith(path) and "\n" not in message
  assert len(message) < len(path) + 600
  return message


@pytest.mark.parametrize("kind", CONTENTS)
def test_every_cut_is_noticed(kind, tmp_path):
  content = CONTENTS[kind]()
  path = tmp_path / "cut.bin"
  lengths = {*range(20), *np.linspace(0, len(content) - 1, 60, dtype=int)}
  lengths |= {len(content) - n for n in range(1, 12)}
  for length in sorted(lengths):
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match="cut.bin: "):
      weight_files.read(str(path))


def _pickle_of(content: bytes) -> tuple[bytes, dict[str, bytes]]:
  """Returns what to damage, and a zip archive's other records."""
  if content[:2] != b"PK":
    return content, {}
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    records = {n: archive.read(n) for n in archive.namelist()}
  (key,) = (n for n in records if n.endswith("/data.pkl"))
  return records.pop(key), records


def _mutated(content: bytes, random: np.random.Generator) -> bytes:
  """Returns content with some bytes replaced, cut out or repeated."""
  changed = bytearray(content)
  for at in random.integers(0, len(content), random.integers(1, 4)):
    way, length = random.integers(4), random.integers(1, 9)
    if way == 0:
      del changed[at : at + length]
    elif way == 1:
      changed[at:at] = changed[at : at + length]
    else:
      changed[at : at + 1] = random.bytes(1)
  return bytes(changed)


@pytest.mark.parametrize("kind", CONTENTS)
def test_changed_bytes_never_crash(kind, tmp_path):
  # A checksum guards the records of zip archives, and is made to fit here.
  content, records = _pickle_of(CONTENTS[kind]())
  path = tmp_path / "changed.bin"
  random = np.random.default_rng(0)
  refused = 0
  for _ in range(150):
    changed = _mutated(content, random)
    if records:
      with zipfile.ZipFile(path, "w") as archive:
        (folder,) = {n.split("/")[0] for n in records}
        archive.writestr(f"{folder}/data.pkl", changed)
        for key, record in records.items():
          archive.writestr(key, record)
    else:
      path.write_bytes(changed)
    try:
      weight_files.read(str(path))
    except UserError:
      refused += 1
  assert refused


def _zip(tmp_path, body, content=bytes(24), **options) -> str:
  records = {"data/0": content}
  return craft.write_zip(tmp_path / "a.pt", body, records, **options)


@pytest.mark.parametrize(
    "shape, words",
    [
        (dict(offset=1), "reaches element 7 of a storage of 6"),
        (dict(size=(3, 3)), "reaches element 9"),
        (dict(stride=(4, 1)), "reaches element 7"),
        (dict(stride=(1 << 62, 1)), "reaches element"),
        (dict(offset=1 << 62), "reaches element"),
        (dict(size=(-1, 3)), "size of a tensor: got .-1, 3., expected"),
        (dict(stride=(-3, 1)), "stride of a tensor: got .-3, 1., expected"),
        (dict(offset=-1), "offset"),
        (dict(size=(2,)), "size"),
        (dict(size=(1 << 70, 1)), "got .a huge number, 1., expected"),
        (dict(size=(1 << 40, 3), stride=(0, 1)), "expands 6 stored numbers"),
        (dict(size=(1 << 62,) * 2, stride=(0, 0)), "expands"),
        (dict(size=(0, 1 << 60), stride=(1, 1)), "expands"),
        (dict(size=(1,) * 33, stride=(1,) * 33), "up to 32"),
    ],
)
def test_tensors_outside_of_their_storage_are_named(tmp_path, shape, words):
  body = craft.dict_of(the_weight=tensor(storage(), **shape))
  message = error_of(_zip(tmp_path, body))
  assert re.search(words, message)
  assert "a tensor" in message or "'the_weight'" in message


def test_strides_of_axes_of_length_one_are_free(tmp_path):
  body = craft.dict_of(w=tensor(storage(), size=(1, 6), stride=(1 << 62, 1)))
  path = _zip(tmp_path, body, np.arange(6, dtype="f4").tobytes())
  found = weight_files.read(path).groups[""]["w"]
  np.testing.assert_array_equal(found, [np.arange(6)])


@pytest.mark.parametrize(
    "of, content, words",
    [
        (storage(numel=1 << 50), bytes(24), "expected 1125899906842624 "),
        (storage(numel=5), bytes(24), "'0': got 24 bytes, expected 5 "),
        (storage(numel=6), bytes(20), "'0': got 20 bytes, expected 6 "),
        (storage(kind="DoubleStorage"), bytes(24), "6 numbers of float64"),
        (storage(numel=-1), bytes(24), "expected a storage"),
        (storage(numel=1 << 90), bytes(24), "expected a storage"),
        (storage(key="7"), bytes(24), "record 'data/7': got none"),
        (storage(key="../../x"), bytes(24), "got none"),
    ],
)
def test_storages_must_be_as_long_as_declared(tmp_path, of, content, words):
  body = craft.dict_of(w=tensor(of))
  assert words in error_of(_zip(tmp_path, body, content))


def test_legacy_storages_must_be_as_long_as_declared(tmp_path):
  path = tmp_path / "a.pth"
  body = craft.dict_of(w=tensor(storage(view=b"N")))
  for numel, words in ((1 << 60, "got 1152921504606846976"), (-1, "got -1")):
    records = numel.to_bytes(8, "little", signed=True) + bytes(24)
    path.write_bytes(craft.legacy(body, ["0"], records))
    assert words in error_of(str(path))
  path.write_bytes(craft.legacy(body, ["1"], bytes(24)))
  assert "storage '1': got no tensor" in error_of(str(path))
  path.write_bytes(craft.legacy(body))
  assert "storage without a record" in error_of(str(path))


def test_a_storage_is_declared_once(tmp_path):
  twice = [tensor(storage()), tensor(storage(kind="IntStorage"))]
  body = craft.dict_of(a=twice[0], b=twice[1])
  assert "two different declarations" in error_of(_zip(tmp_path, body))


HONEST = craft.dict_of(w=tensor(storage()))


def test_compressed_archives_are_refused(tmp_path):
  path = _zip(tmp_path, HONEST, compression=zipfile.ZIP_DEFLATED)
  assert "compressed or encrypted" in error_of(path)


def test_a_wrong_checksum_is_noticed(tmp_path):
  path = _zip(tmp_path, HONEST, b"0123456789" * 2 + b"abcd")
  content = pathlib.Path(path).read_bytes()
  assert content.count(b"0123456789") == 2
  pathlib.Path(path).write_bytes(content.replace(b"0123456789", b"0123456780"))
  assert "CRC" in error_of(path)


def _overlapping(count: int, size: int) -> bytes:
  """Returns an archive of records of which each holds all that follow it."""
  entries, tensors, after = [], {}, bytes(size)
  for i in reversed(range(count)):
    key = f"{i:06}"
    of = storage(key, len(after), "ByteStorage")
    tensors[key] = tensor(of, size=(1,), stride=(1,))
    after = _entry(entries, f"archive/data/{key}", after, len(after))
  body = craft.pickled(craft.dict_of(**tensors))
  whole = _entry(entries, "archive/data.pkl", body + after, len(body))
  # The directory; an offset counts from the start, which was written last.
  directory = b""
  for fields, file, rest in entries:
    start = struct.pack("<10xI", len(whole) - rest)
    directory += b"PK\1\2\x14\0" + fields + start + file
  counts = (0, 0, len(entries), len(entries), len(directory), len(whole), 0)
  end = struct.pack("<4H2IH", *counts)
  return whole + directory + b"PK\5\6" + end


def _entry(entries: list, file: str, content: bytes, length: int) -> bytes:
  """Returns a record's header and content, and notes it for the directory."""
  sizes = (zlib.crc32(content[:length]), length, length)
  fields = struct.pack("<5H3I2H", 20, 0, 0, 0, 33, *sizes, len(file), 0)
  made = b"PK\3\4" + fields + file.encode() + content
  entries.append((fields, file.encode(), len(made)))
  return made


def test_records_that_overlap_are_refused(tmp_path):
  path = tmp_path / "a.pt"
  path.write_bytes(_overlapping(400, 1 << 18))
  assert "expected at most those of the file" in error_of(str(path))


@pytest.mark.parametrize(
    "records, words",
    [
        ({"byteorder": b"middle"}, "byteorder: got b'middle'"),
        ({"code/x.py": b""}, "TorchScript"),
    ],
)
def test_archives_of_another_kind(tmp_path, records, words):
  records = {"data/0": bytes(24)} | records
  path = craft.write_zip(tmp_path / "a.pt", HONEST, records)
  assert words in error_of(path)


def test_an_npz_is_no_checkpoint(tmp_path):
  np.savez(tmp_path / "a.npz", w=np.ones(3))
  assert "got 0 records */data.pkl" in error_of(str(tmp_path / "a.npz"))


def _doubled() -> bytes:
  """A list of twice a list of twice ...: 2 ** 17 lists in a few bytes."""
  return b"](e" + b"".join(
      b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e"
      for i in range(17)
  )


def _copied() -> bytes:
  """One text of 1 MB that is made into bytes 100 times."""
  args = craft.tuple_of(text("x" * (1 << 20)), text("latin1"))
  encode = name("_codecs", "encode")
  again = b"q\x01" + args + b"q\x020" + b"](" + b"h\x01h\x02R" * 100 + b"e"
  return encode + again


BOMBS = {
    "memo": (b"Nr\xff\xff\xff\x7f", "memo index: got 2147483647"),
    "bytearray": (b"\x96" + (1 << 40).to_bytes(8, "little"), "ends early"),
    "bytes": (b"\x8e" + (1 << 62).to_bytes(8, "little"), "ends early"),
    "text": (b"\x8d" + b"\xff" * 8, "ends early"),
    "old_text": (b"T\xff\xff\xff\xff", "ends early"),
    "frame": (b"\x95" + (1 << 40).to_bytes(8, "little"), "ends early"),
    "frame_of_64_bits": (b"\x95" + b"\xff" * 8 + b"N", "frame size"),
    "long": (b"\x8b\x00\x00\x01\x00" + b"\x01" * 65536, "opcode LONG4"),
    "itself": (b"]q\x01(h\x01e", "contain themselves"),
    "doubled": (_doubled(), "more than 5000 values"),
    "copied": (_copied(), "too many objects or copies"),
    "bytes_of_a_number": (
        call(name("builtins", "bytearray"), number(1 << 40)),
        "expected latin1",
    ),
    "array": (
        call(name("numpy.core.multiarray", "_reconstruct"), b"N")
        + craft.tuple_of(
            number(1),
            craft.tuple_of(number(1 << 40)),
            call(name("numpy", "dtype"), text("f4"), b"\x89", b"\x88"),
            b"\x89",
            craft.blob(b"1234"),
        )
        + b"b",
        "got 4 bytes, expected 4398046511104",
    ),
    "empty": (b"", "malformed"),
    "no_mark": (b"t", "malformed"),
    "no_memo": (b"h\x07", "malformed"),
    "key_alone": (b"}(K\x01u", "malformed"),
}


DEEP = {
    "lists_in_lists": (b"]" * 200_000 + b"a" * 199_999, "nested deeper"),
    "tuples_in_tuples": (b")" + b"\x85" * 200_000, "nested deeper"),
    "deep_key": (b"})" + b"\x85" * 200_000 + b"Ns", "got a tuple"),
    "deep_member": (b"\x8f()" + b"\x85" * 200_000 + b"\x90", "got a tuple"),
    "deep_shape": (
        call(name("torch", "Size"), b")" + b"\x85" * 200_000),
        "torch.Size: got a tuple",
    ),
}


@pytest.mark.parametrize("case", DEEP)
def test_depth_cannot_exhaust_the_stack(case, tmp_path):
  body, words = DEEP[case]
  assert words in error_of(_zip(tmp_path, body), traced=False)


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused(case, tmp_path, monkeypatch):
  # The limit in earnest would only take longer to reach.
  monkeypatch.setattr(trees, "_MAX_NODES", 5000)
  body, words = BOMBS[case]
  assert words in error_of(_zip(tmp_path, body))


def test_long_names_are_refused(tmp_path):
  # 100 000 tensors below one name of 1 MB would need 100 GB of names.
  body = b"}(" + text("x" * (1 << 20)) + HONEST + b"u"
  body = craft.dict_of(group=body)
  assert "key: got 'xxx" in error_of(_zip(tmp_path, body))


def test_two_tensors_of_one_name_are_refused(tmp_path):
  body = b"}(" + text("a.b") + tensor(storage()) + text("a")
  body += craft.dict_of(b=tensor(storage())) + b"u"
  path = _zip(tmp_path, craft.dict_of(group=body))
  assert "tensor 'a.b': got two" in error_of(path)
