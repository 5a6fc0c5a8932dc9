"""The zip files of EDM."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from bcm_jax.data import decoding
from bcm_jax.data import edm_zip
from bcm_jax.errors import UserError
from tests.data import pictures

N = 6
LABELS = [2, 0, 0, 1, 2, 4]


def _name(k):
  return f"{k // 4:05d}/img{k:08d}.png"


def _write(path, labels=LABELS, members=None, **files):
  """Writes what dataset_tool.py writes: stored, labels last."""
  if members is None:
    members = {_name(k): pictures.encode(pictures.noise(k)) for k in range(N)}
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    # Against the order of names, which is the order of indices.
    for name in sorted(members, reverse=True):
      archive.writestr(name, members[name])
    if labels is not None:
      table = list(zip(sorted(members), labels, strict=True))
      archive.writestr("dataset.json", json.dumps({"labels": table}))
    for name, content in files.items():
      archive.writestr(name.replace("_", "."), content)
  return str(path)


def _open(path, split="train", **options):
  found = edm_zip.data_set(str(path), decoding.Decoder(), **options)
  return found.open(split, None)


def _all(source):
  return source.fetch(np.arange(len(source)))


def test_images_and_labels_come_back(tmp_path):
  file = _write(tmp_path / "x.zip")
  found = edm_zip.data_set(file, decoding.Decoder())
  assert found.image_shape == (8, 8, 3) and found.num_classes == 5
  assert found.splits == ("train",)
  got = _all(found.open("train", None))
  np.testing.assert_array_equal(
      got["image"], [pictures.noise(k) for k in range(N)]
  )
  assert got["label"].tolist() == LABELS


@pytest.mark.parametrize("content", [None, '{"labels": null}'])
def test_without_labels(tmp_path, content):
  files = {} if content is None else {"dataset_json": content}
  source = _open(_write(tmp_path / "x.zip", labels=None, **files))
  assert source.num_classes is None
  assert _all(source)["label"].tolist() == [0] * N


def test_splits(tmp_path):
  _write(tmp_path / "train.zip")
  members = {"a.png": pictures.encode(pictures.noise(9))}
  _write(tmp_path / "test.zip", [3], members)
  source = _open(tmp_path, "test")
  assert len(source) == 1 and source.num_classes == 5
  got = _all(source)
  assert got["label"].tolist() == [3]
  np.testing.assert_array_equal(got["image"][0], pictures.noise(9))


def test_npy_members_are_channels_first(tmp_path):
  members = {}
  for k in range(2):
    buffer = io.BytesIO()
    np.save(buffer, np.moveaxis(pictures.noise(k), -1, 0))
    members[f"{k}.npy"] = buffer.getvalue()
  got = _all(_open(_write(tmp_path / "x.zip", [0, 1], members)))
  np.testing.assert_array_equal(
      got["image"], [pictures.noise(0), pictures.noise(1)]
  )


def test_many_threads_read_at_the_same_time(tmp_path):
  source = _open(_write(tmp_path / "x.zip"), threads=2)
  images = np.stack([pictures.noise(k) for k in range(N)])
  assert pictures.fetch_from_threads(source, images, np.array(LABELS), 50)


def test_a_copy_of_another_process_is_the_same_source(tmp_path):
  source = _open(_write(tmp_path / "x.zip"))
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(_all(copy)["image"], _all(source)["image"])


# Bad input.


def test_no_zip(tmp_path):
  (tmp_path / "x.zip").write_bytes(b"no zip")
  with pytest.raises(UserError, match="x.zip"):
    _open(tmp_path / "x.zip")
  with pytest.raises(UserError, match="train.zip"):
    _open(tmp_path)


def test_no_images(tmp_path):
  file = _write(tmp_path / "x.zip", None, {"notes.txt": b""})
  with pytest.raises(UserError, match="x.zip"):
    _open(file)


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", ""),
        ("{}", ""),
        (json.dumps({"labels": [1, 2]}), ""),
        (json.dumps({"labels": [[_name(0), [0, 1]]]}), r"\[0, 1\]"),
        (json.dumps({"labels": [[_name(0), -1]]}), "-1"),
        (json.dumps({"labels": [[_name(0), 1]]}), _name(1)),
    ],
)
def test_labels_that_cannot_be(tmp_path, content, named):
  file = _write(tmp_path / "x.zip", labels=None, dataset_json=content)
  with pytest.raises(UserError, match=f"dataset.json.*{named}"):
    _open(file)


def test_a_member_that_is_no_image(tmp_path):
  members = {
      "a.png": pictures.encode(pictures.noise(0)), "b.png": b"no image"
  }
  file = _write(tmp_path / "x.zip", [0, 1], members)
  with pytest.raises(UserError, match="x.zip/b.png"):
    _all(_open(file))
  source = _open(file, skip_corrupt=True)
  assert source.skipped == ("b.png",) and len(source) == 1


def test_a_damaged_member_is_found_by_its_checksum(tmp_path):
  # A BMP has no checksum of its own: a changed pixel is found by that of zip.
  members = {
      f"{k}.bmp": pictures.encode(pictures.noise(k), "bmp") for k in range(2)
  }
  file = tmp_path / "x.zip"
  _write(file, [0, 1], members)
  content = bytearray(file.read_bytes())
  content[content.index(members["1.bmp"]) + 100] ^= 1
  file.write_bytes(content)
  with pytest.raises(decoding.CorruptImage, match="1.bmp.*CRC"):
    _all(_open(file))
  source = _open(file, skip_corrupt=True)
  assert source.skipped == ("1.bmp",)


def test_splits_must_both_have_labels(tmp_path):
  _write(tmp_path / "train.zip")
  _write(tmp_path / "test.zip", labels=None)
  with pytest.raises(UserError, match="label"):
    _open(tmp_path, "test")
