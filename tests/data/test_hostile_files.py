"""Zip and .npz files that are damaged, hostile or odd: one line, no hang."""

import io
import pickle
import stat
import struct
import zipfile

import numpy as np
import pytest

from bcm_jax.data import datasets
from bcm_jax.data import pairs
from bcm_jax.errors import UserError
from tests.data import pictures

PNG = pictures.encode(pictures.noise(0))
IMAGES = np.zeros((4, 8, 8, 3), np.uint8)
_CENTRAL = b"PK\x01\x02"


def _zip(members, compression=zipfile.ZIP_STORED):
  """Returns the bytes of a zip file of (name or ZipInfo, content) pairs."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", compression) as archive:
    for name, content in members:
      archive.writestr(name, content)
  return buffer.getvalue()


def _patched(content, central, local, value):
  """Changes a field of the first member in both headers of a zip file."""
  content = bytearray(content)
  at = content.index(_CENTRAL) + central
  content[at : at + len(value)] = value
  if local is not None:
    content[local : local + len(value)] = value
  return bytes(content)


def _fetch(tmp_path, kind, content):
  file = tmp_path / f"x.{kind}"
  file.write_bytes(content)
  source = datasets.find(kind, path=str(file)).open("train", None)
  return source.fetch(np.arange(len(source)))


_ONE = _zip([("a.png", PNG)])
_LINK = zipfile.ZipInfo("a.png")
_LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
_ZIPS = {
    "traversal": (_zip([("../../a.png", PNG), ("b.png", PNG)]), "a.png"),
    "absolute": (_zip([("/etc/a.png", PNG)]), "a.png"),
    "backslashes": (_zip([("..\\a.png", PNG)]), "a.png"),
    "encrypted": (_patched(_ONE, 8, 6, b"\x01"), "a.png"),
    "deflate64": (_patched(_ONE, 10, 8, b"\x09"), "a.png"),
    "claims 4 GB": (_patched(_ONE, 24, None, b"\xfe\xff\xff\xff"), "a.png"),
    "duplicate": (None, "a.png"),
    "bad name": (_zip([("ää.png", PNG)]).replace("ää".encode(), b"\xff" * 4),
                 "x.zip"),
    "nested": (_zip([("in.zip", _ONE)]), "1 .zip"),
    "link": (_zip([(_LINK, "/etc/passwd")]), "a.png"),
    "empty": (_zip([]), "x.zip"),
    "cut": (_ONE[:-30], "x.zip"),
    "no zip": (b"Rar!\x1a\x07", "x.zip"),
    "bomb": (_zip([("a.png", bytes(2**22))], zipfile.ZIP_DEFLATED), "a.png"),
    "lzma": (None, "a.png"),
}


def _zip_content(name):
  if name == "duplicate":
    with pytest.warns(UserWarning):
      return _zip([("a.png", PNG), ("a.png", PNG)])
  if name == "lzma":
    content = bytearray(_zip([("a.png", PNG)], zipfile.ZIP_LZMA))
    content[50:56] = bytes(6)
    return bytes(content)
  return _ZIPS[name][0]


@pytest.mark.parametrize("name", _ZIPS)
def test_zip_files_that_cannot_be(tmp_path, name):
  with pytest.raises(UserError, match=_ZIPS[name][1]):
    _fetch(tmp_path, "zip", _zip_content(name))
  assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("compression", [
    zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA,
])
def test_zip_files_of_any_compression(tmp_path, compression):
  content = _zip([("C:\\x\\a.png", PNG), ("C:\\x\\b.png", PNG)], compression)
  got = _fetch(tmp_path, "zip", content)
  np.testing.assert_array_equal(got["image"], [pictures.noise(0)] * 2)


def _npz(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _claimed(shape, dtype="|u1", content=bytes(768)):
  """Returns a .npz whose header has this shape, as text."""
  header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
  header = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
  npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
  return _zip([("arr_0.npy", npy + content)])


_NPZS = {
    "objects": _npz(arr_0=np.array([None, 1], object)),
    "object labels": _npz(arr_0=IMAGES, arr_1=np.array([{}] * 4)),
    "NaN": _npz(arr_0=np.full(IMAGES.shape, np.nan, np.float32)),
    "int64": _npz(arr_0=IMAGES.astype(np.int64)),
    "bool": _npz(arr_0=IMAGES.astype(bool)),
    "structured": _npz(arr_0=np.zeros((4, 8, 8, 3), [("r", "u1")])),
    "texts": _npz(arr_0=np.array([[[["a"]]]])),
    "scalar": _npz(arr_0=np.uint8(1)),
    "no pixels": _npz(arr_0=IMAGES[:, :0]),
    "labels above int32": _npz(arr_0=IMAGES, arr_1=np.array([0, 1, 1, 2**31])),
    "labels above int64": _npz(
        arr_0=IMAGES, arr_1=np.array([0, 1, 1, 2**63], np.uint64)),
    "times": _npz(arr_0=IMAGES, arr_1=np.array([0, 1, 1, 2], "m8[s]")),
    "one label": _npz(arr_0=IMAGES, arr_1=np.int64(3)),
    "one-hot": _npz(arr_0=IMAGES, arr_1=np.eye(4, dtype=np.int64)),
    "labels of another name": _npz(arr_0=IMAGES, train_labels=np.arange(4)),
    "classes": _npz(images=IMAGES, Class=np.arange(4)),
    "two images": _npz(arr_0=IMAGES, images=IMAGES),
    "two labels": _npz(arr_0=IMAGES, arr_1=np.arange(4), y=np.arange(4)),
    "huge": _claimed("(1000000000000, 64, 64, 3)"),
    "beyond int64": _claimed("(4294967296, 4294967296, 4294967296, 3)"),
    "negative": _claimed("(-4, -8, 8, 3)"),
    "smaller": _claimed("(1, 8, 8, 3)"),
    "claimed objects": _claimed("(4, 8, 8, 3)", "|O"),
    "no bytes": _claimed("(4, 8, 8, 3)", "|V0"),
    "code": _claimed("__import__('os')"),
    "no tuple": _claimed("(((("),
    "nested": _claimed("(" * 3000 + ")" * 3000),
    "long": _claimed("1" * 5000),
    "no npy": _zip([("arr_0.npy", b"xx")]),
    "no suffix": _zip([("arr_0", b"xx")]),
    "encrypted": _patched(_npz(arr_0=IMAGES), 8, 6, b"\x01"),
    "deflate64": _patched(_npz(arr_0=IMAGES), 10, 8, b"\x09"),
    "pickle": pickle.dumps([1]),
    "cut": _npz(arr_0=IMAGES)[:-30],
    "empty": b"",
}


@pytest.mark.parametrize("name", _NPZS)
def test_npz_files_that_cannot_be(tmp_path, name):
  with pytest.raises(UserError, match="x.npz"):
    _fetch(tmp_path, "npz", _NPZS[name])


def test_statistics_beside_images_are_no_labels(tmp_path):
  content = _npz(arr_0=IMAGES, mu=np.zeros(4), sigma=np.zeros((4, 4)))
  assert len(_fetch(tmp_path, "npz", content)["image"]) == 4


def test_an_npz_file_with_two_arrays_of_one_name(tmp_path):
  with pytest.warns(UserWarning):
    content = _zip([("arr_0.npy", b"a"), ("arr_0.npy", b"b")])
  with pytest.raises(UserError, match="x.npz"):
    _fetch(tmp_path, "npz", content)


def test_an_npz_file_larger_than_the_memory(tmp_path, monkeypatch):
  monkeypatch.setattr("os.sysconf", lambda name: 10)
  with pytest.raises(UserError, match="x.npz.*768.*memory, 100"):
    _fetch(tmp_path, "npz", _npz(arr_0=IMAGES))


_PAIRS = dict(
    noise=np.zeros((2, 8, 8, 3), np.float16), image=IMAGES[:2],
    label=np.zeros(2, np.int32), facts="{}",
)


@pytest.mark.parametrize("changes", [
    dict(facts="{"),
    dict(facts=np.array([None])),
    dict(noise=np.full((2, 8, 8, 3), np.nan, np.float16)),
    dict(noise=IMAGES[:2]),
    dict(noise=np.zeros((3, 8, 8, 3), np.float16)),
    dict(image=np.zeros((2, 8, 8, 3), np.float32)),
    dict(label=np.array([0, 9])),
    dict(label=np.array(["a", "b"])),
    dict(label=None),
])
def test_pairs_that_cannot_be(tmp_path, changes):
  file = str(tmp_path / "pairs.npz")
  np.savez(file, **_PAIRS)
  assert len(pairs.PairSource(file, (8, 8, 3), 2)) == 2
  arrays = {k: v for k, v in (_PAIRS | changes).items() if v is not None}
  np.savez(file, **arrays)
  with pytest.raises(UserError, match="pairs.npz"):
    pairs.PairSource(file, (8, 8, 3), 2)
  with pytest.raises(UserError, match="data.pairs"):
    pairs.PairSource(file + ".gone", (8, 8, 3), 2)
