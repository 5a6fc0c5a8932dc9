"""What is written is read back bit by bit, also by torch, whole or not."""

import os
import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.interop import torch_writer
from bcm_jax.interop import weight_files
from tests.interop import recipe

# make_torch_files.py --check has read it with torch.load(weights_only=True).
READ_BY_TORCH = pathlib.Path(__file__).parent / "files" / "written.pt"


def records(path) -> dict[str, bytes]:
  with zipfile.ZipFile(path) as archive:
    assert archive.testzip() is None
    return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_is_bit_identical(tmp_path, suffix):
  tensors = recipe.state_dict()
  path = str(tmp_path / "folder" / f"weights{suffix}")
  weight_files.write(path, tensors)
  found = weight_files.read(path).groups[""]
  assert sorted(found) == sorted(tensors)
  for name, value in tensors.items():
    value = np.asarray(value)
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    assert found[name].tobytes() == value.tobytes(), name
  assert os.listdir(tmp_path / "folder") == [f"weights{suffix}"]


def test_the_file_is_the_one_that_torch_has_read(tmp_path):
  path = str(tmp_path / "weights.pt")
  weight_files.write(path, recipe.state_dict())
  assert records(path) == records(READ_BY_TORCH)


def test_records_are_what_torch_expects(tmp_path):
  path = str(tmp_path / "weights.pt")
  weight_files.write(path, {"a": np.ones(3, "f4"), "b": np.ones((), "i8")})
  found = records(path)
  assert found["archive/version"] == b"3\n"
  assert found["archive/byteorder"] == b"little"
  assert found["archive/data/0"] == np.ones(3, "f4").tobytes()
  content = pathlib.Path(path).read_bytes()
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      assert info.compress_type == zipfile.ZIP_STORED
      start = info.header_offset + 30
      start += int.from_bytes(content[start - 4 : start - 2], "little")
      start += int.from_bytes(
          content[info.header_offset + 28 : info.header_offset + 30], "little"
      )
      assert start % 64 == 0
      assert content[start:].startswith(found[info.filename])


def test_foreign_layouts_are_written_as_plain_ones(tmp_path):
  value = np.arange(6, dtype=np.int32).reshape(2, 3)
  tensors = {
      "big": value.astype(">i4"),
      "fortran": np.asfortranarray(value),
      "reversed": value[::-1],
      "list": [1.0, 2.0],
  }
  for suffix in (".pt", ".safetensors"):
    path = str(tmp_path / f"weights{suffix}")
    weight_files.write(path, tensors)
    found = weight_files.read(path).groups[""]
    for name in tensors:
      np.testing.assert_array_equal(found[name], np.asarray(tensors[name]))


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("a.pt", np.ones(2, np.uint16), "'w' is uint16, which .pt files"),
        ("a.pt", np.ones(2, ml_dtypes.float8_e5m2), "'w' is float8_e5m2"),
        ("a.pt", np.array(["x"]), "expected plain numbers"),
        ("a.pt", np.array([None]), "expected plain numbers"),
        ("a.safetensors", np.ones(2, np.complex128), "which .safetensors"),
        ("a.npz", np.ones(2), "suffix '.npz'"),
    ],
)
def test_what_cannot_be_written_is_named_and_the_old_file_stays(
    tmp_path, name, value, words
):
  path = tmp_path / name
  path.write_bytes(b"the old file")
  with pytest.raises(UserError, match=words):
    weight_files.write(str(path), {"w": value})
  assert path.read_bytes() == b"the old file"
  assert os.listdir(tmp_path) == [name]


def test_names_must_be_text(tmp_path):
  with pytest.raises(UserError, match="name 3 of a tensor is no text"):
    weight_files.write(str(tmp_path / "a.pt"), {3: np.ones(2)})


def test_nothing_remains_of_a_write_that_fails_half_way(tmp_path, monkeypatch):
  record, calls = torch_writer._record, []

  def full_disk(*args):
    calls.append(args)
    if len(calls) == 3:
      raise OSError("no space left on device")
    record(*args)

  monkeypatch.setattr(torch_writer, "_record", full_disk)
  path = tmp_path / "a.pt"
  with pytest.raises(OSError, match="no space"):
    weight_files.write(str(path), recipe.state_dict())
  assert len(calls) == 3 and os.listdir(tmp_path) == []


def test_a_bare_file_name_is_enough(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  weight_files.write("a.pt", {"w": np.ones(2)})
  assert weight_files.read("a.pt").groups[""]["w"].tolist() == [1, 1]
