"""Files of real torch, safetensors and Flax give the recipe's numbers."""

import collections
import json
import os
import pathlib
import pickle
import pickletools
import shutil
import struct
import tracemalloc
from typing import Any

import flax
from flax import serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bcm_jax.errors import UserError
from bcm_jax.interop import torch_files
from bcm_jax.interop import weight_files
from tests.interop import craft
from tests.interop import recipe

FILES = pathlib.Path(__file__).parent / "files"
KINDS = {"zip": "torch_zip", "legacy": "torch_legacy"}


def same_bits(found: dict, expected: dict) -> None:
  """Asserts equal names, dtypes, shapes and bits."""
  assert sorted(found) == sorted(expected)
  for name, value in expected.items():
    value = np.asarray(value)
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    assert found[name].tobytes() == value.tobytes(), name


def read(name: str) -> weight_files.WeightFile:
  return weight_files.read(str(FILES / name))


@pytest.mark.parametrize("container", KINDS)
def test_state_dict_of_every_dtype_and_view(container):
  weights = read(f"state_{container}.pt")
  assert weights.kind == KINDS[container]
  assert list(weights.groups) == [""] and weights.metadata == {}
  same_bits(weights.groups[""], recipe.state_dict())


@pytest.mark.parametrize("container", KINDS)
def test_dtypes_in_untyped_storages(container):
  expected = {name: recipe.of_dtype(name) for name in recipe.LATER_DTYPES}
  same_bits(read(f"later_{container}.pt").groups[""], expected)


@pytest.mark.parametrize("container", KINDS)
def test_tensors_are_read_only_and_share_their_storage(container):
  tensors = read(f"state_{container}.pt").groups[""]
  for name in ("shared", "transposed", "sliced", "last"):
    assert np.shares_memory(tensors[name], tensors["base"])
  for name, array in tensors.items():
    if array.size:
      with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    assert array.flags.aligned, name


@pytest.mark.parametrize("container", KINDS)
def test_checkpoint_gives_groups_and_plain_values(container):
  weights = read(f"checkpoint_{container}.pt")
  model = recipe.numbers(300, 2, 2).astype(np.float32)
  ema = recipe.numbers(301, 2, 2).astype(np.float16)
  expected = {
      "": {
          "counter": np.int64(7),
          "array": np.arange(6, dtype=np.int32).reshape(2, 3).T,
      },
      "model": {"a.weight": model},
      "ema": {"a.weight": ema},
      "optimizer": {"state.0.step": np.float32(2), "state.0.exp_avg": model},
      "averages": {"0": np.ones(2, "f4"), "1": np.zeros(1, "f4")},
  }
  assert weights.groups.keys() == expected.keys()
  for group, tensors in expected.items():
    same_bits(weights.groups[group], tensors)
  assert weights.metadata == dict(
      step=3,
      config=dict(width=128, rate=1e-3, name="unet", size=[2, 3]),
      optimizer=dict(param_groups=[dict(lr=0.25, betas=[0.9, 0.999])]),
      dtype="torch.float32",
      device="cpu",
      names=["a", "b"],
  )


@pytest.mark.parametrize("container", KINDS)
def test_whole_modules_become_trees(container):
  weights = read(f"module_{container}.pt")
  same_bits(weights.groups[""], {"inner.weight": np.arange(3, dtype="f4")})
  assert weights.metadata == {"": {"class_name": "Tiny"}}


@pytest.mark.parametrize(
    "name, group, dtype",
    [
        ("edm_2.pkl", "ema", np.float32),
        ("edm_4.pkl", "ema", np.float32),
        ("edm_5.pkl", "ema", np.float32),
        ("edm2.pkl", "ema", np.float16),
        ("net.pkl", "net", np.float32),
    ],
)
def test_edm_pickles_are_read_and_their_source_is_not_run(
    name, group, dtype, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path = FILES / name
  assert recipe.TRACE.encode() in path.read_bytes()
  weights = weight_files.read(str(path))
  assert weights.kind == "edm_pickle" and list(weights.groups) == [group]
  same_bits(weights.groups[group], recipe.network(dtype))
  assert not list(tmp_path.iterdir())


def test_the_embedded_source_would_leave_a_trace(tmp_path, monkeypatch):
  # The control of the test above.
  monkeypatch.chdir(tmp_path)
  with pytest.raises(RuntimeError, match="embedded source"):
    exec(recipe.MODULE_SOURCE, {})
  assert (tmp_path / recipe.TRACE).exists()


@pytest.mark.parametrize("name", ["edm_2.pkl", "edm_4.pkl", "edm2.pkl"])
def test_edm_metadata_has_what_builds_the_network(name):
  metadata = read(name).metadata
  assert metadata["class_name"] == "EDMPrecond"
  assert metadata["init_kwargs"] == dict(
      img_resolution=8, img_channels=3, label_dim=0, model_type="SongUNet"
  )
  assert metadata["attributes"] == dict(
      training=False, sigma_data=0.5, sigma_max=float("inf")
  )
  assert metadata["modules"]["model"] == dict(
      class_name="SongUNet",
      init_args=[],
      init_kwargs=dict(channel_mult=[1, 2], embedding_type="positional"),
  )
  assert metadata["modules"]["model.conv"]["init_args"] == [3, 4]
  assert metadata["modules"]["model.norm"] == dict(class_name="GroupNorm")
  assert metadata["dataset_kwargs"]["path"] == "a.zip"
  assert metadata["loss_fn"]["class_name"] == "EDMLoss"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("optimize", [False, True])
def test_plain_values_of_every_protocol(tmp_path, protocol, optimize):
  many = [
      collections.OrderedDict(a=[], b={}, c=(1, 2, 3, i)) for i in range(99)
  ]
  values = {
      "text": "\u00e4\u4e2d" * 200,
      "raw": [bytes(range(256)), bytearray(b"ab")],
      "numbers": [None, True, -1, 255, 65536, -(2**31), 2**60, -(2**70), 1.5],
      "sets": [{1, 2}, frozenset([3, 4]), [frozenset(), set()]], "many": many,
      "types": collections.defaultdict(int, {7: np.float32(2), -7: ()}),
      "tuples": [(), (1,), (1, 2), (1, 2, 3), (((),),)],
  }
  values["again"] = values["raw"]
  content = pickle.dumps(dict(ema=np.arange(3), rest=values), protocol)
  if optimize:
    content = pickletools.optimize(content)
  path = tmp_path / "a.pkl"
  path.write_bytes(content)
  weights = weight_files.read(str(path))
  np.testing.assert_array_equal(weights.groups["ema"][""], np.arange(3))
  expected = values | dict(
      sets=[["1", "2"], ["3", "4"], [[], []]], types={7: 2.0, -7: []},
      tuples=[[], [1], [1, 2], [1, 2, 3], [[[]]]],
      many=[each | {"c": list(each["c"])} for each in many],
  )
  assert weights.metadata == {"rest": expected}


def test_pickle_without_a_network_lists_its_keys(tmp_path):
  path = tmp_path / "other.pkl"
  path.write_bytes(craft.pickled(craft.dict_of(G=b"N", D=b"N")))
  with pytest.raises(UserError, match="got 'G', 'D', expected .*'ema'"):
    weight_files.read(str(path))


def test_views_of_the_oldest_format(tmp_path):
  # torch 0.3: a storage may be elements 2..5 of another one.
  root = np.arange(8, dtype=np.float32)
  view = craft.tuple_of(craft.text("9"), craft.number(2), craft.number(4))
  body = craft.dict_of(
      part=craft.tensor(
          craft.storage("7", 8, view=view), 1, size=(3,), stride=(1,)
      ),
      whole=craft.tensor(craft.storage("7", 8, view=b"N"), 0, (8,), (1,)),
  )
  storages = struct.pack("<q", 8) + root.tobytes()
  path = tmp_path / "old.pth"
  path.write_bytes(craft.legacy(body, ["7"], storages))
  tensors = weight_files.read(str(path)).groups[""]
  same_bits(tensors, dict(part=root[3:6], whole=root))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("FloatStorage", ">f4"),
        ("ShortStorage", ">i2"),
        ("ComplexFloatStorage", ">c8"),
        ("BoolStorage", "?"),
    ],
)
def test_big_endian_archives(tmp_path, kind, dtype):
  values = recipe.numbers(5, 2, 3).astype(dtype)
  records = {"data/0": values.tobytes(), "byteorder": b"big"}
  body = craft.dict_of(w=craft.tensor(craft.storage(kind=kind)))
  path = craft.write_zip(tmp_path / "a.pt", body, records)
  found = weight_files.read(path).groups[""]["w"]
  assert found.dtype.isnative
  np.testing.assert_array_equal(found, values)


def test_content_and_not_the_suffix_tells_the_kind(tmp_path):
  for name in ("state_zip.pt", "state_legacy.pt", "edm_4.pkl"):
    copy = tmp_path / (name + ".safetensors")
    shutil.copy(FILES / name, copy)
    assert weight_files.read(str(copy)).kind == read(name).kind


def test_safetensors_with_bfloat16_and_metadata(tmp_path):
  tensors = {
      name: recipe.of_dtype(name)
      for name in recipe.DTYPES | recipe.LATER_DTYPES
  }
  tensors["scalar"] = np.full((), 3, "f4")
  path = tmp_path / "anything.bin"
  path.write_bytes(safetensors.numpy.save(tensors, metadata={"width": "64"}))
  weights = weight_files.read(str(path))
  assert weights.kind == "safetensors" and weights.metadata == {"width": "64"}
  same_bits(weights.groups[""], tensors)


@flax.struct.dataclass
class State:
  """The fields of the training state of the JAX consistency models."""

  step: int
  lr: float
  ema_rate: float
  params: Any
  target_params: Any
  params_ema: Any
  model_state: Any
  opt_state: Any
  rng_state: Any


def test_flax_training_state(tmp_path):
  kernel = recipe.numbers(1, 2, 3).astype(np.float32)
  half = recipe.numbers(2, 3).astype(ml_dtypes.bfloat16)
  gain = np.full((), 2, "f4")
  state = State(
      step=7,
      lr=np.float32(0.5),
      ema_rate=np.asarray(0.75),
      params={"Conv_0": {"kernel": kernel, "gain": gain}},
      target_params={"Conv_0": {"kernel": kernel + 1}},
      params_ema={"Conv_0": {"kernel": kernel + 2}, "Dense": {"bias": half}},
      model_state={},
      opt_state=[{"mu": {"Conv_0": {"kernel": kernel + 3}}}, {}],
      rng_state=np.array([1, 2], np.uint32),
  )
  path = tmp_path / "checkpoint_7"
  path.write_bytes(serialization.to_bytes(state))
  weights = weight_files.read(str(path))
  assert weights.kind == "flax_msgpack"
  expected = {
      "": {"rng_state": state.rng_state},
      "params": {"Conv_0/kernel": kernel, "Conv_0/gain": gain},
      "target_params": {"Conv_0/kernel": kernel + 1},
      "params_ema": {"Conv_0/kernel": kernel + 2, "Dense/bias": half},
      "opt_state": {"0/mu/Conv_0/kernel": kernel + 3},
  }
  assert weights.groups.keys() == expected.keys()
  for group, tensors in expected.items():
    same_bits(weights.groups[group], tensors)
  for key, value in dict(step=7, lr=0.5, ema_rate=0.75).items():
    assert weights.metadata[key] == value


def test_flax_parameters_alone_are_one_group(tmp_path):
  params = {"Conv_0": {"kernel": np.ones((2, 2), "f4")}, "g": np.ones(3, "f4")}
  path = tmp_path / "params.msgpack"
  path.write_bytes(serialization.to_bytes(params))
  groups = weight_files.read(str(path)).groups
  assert groups.keys() == {""}
  assert groups[""].keys() == {"Conv_0/kernel", "g"}


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80", b"cos\n"])
def test_other_files_are_of_no_known_kind(tmp_path, content):
  path = tmp_path / "x.pt"
  path.write_bytes(content)
  with pytest.raises(UserError, match="x.pt: got .* bytes") as error:
    weight_files.read(str(path))
  assert "\n" not in str(error.value)


def test_files_that_cannot_be_opened(tmp_path):
  with pytest.raises(UserError, match="none.pt: cannot be read .*No such"):
    weight_files.read(str(tmp_path / "none.pt"))
  with pytest.raises(UserError, match="cannot be read"):
    weight_files.read(str(tmp_path))


def test_round_trip_is_bit_identical(tmp_path):
  tensors = recipe.state_dict()
  path = str(tmp_path / "folder" / "weights.safetensors")
  weight_files.write(path, tensors)
  same_bits(weight_files.read(path).groups[""], tensors)
  assert os.listdir(tmp_path / "folder") == ["weights.safetensors"]


def test_foreign_layouts_are_written_as_plain_ones(tmp_path):
  value = np.arange(6, dtype=np.int32).reshape(2, 3)
  tensors = {
      "big": value.astype(">i4"),
      "fortran": np.asfortranarray(value),
      "reversed": value[::-1],
      "list": [1.0, 2.0],
  }
  path = str(tmp_path / "weights.safetensors")
  weight_files.write(path, tensors)
  found = safetensors.numpy.load_file(path)
  for name, expected in tensors.items():
    np.testing.assert_array_equal(found[name], np.asarray(expected))


@pytest.mark.parametrize(
    "name, tensors, words",
    [
        ("a.pt", {"w": np.ones(2)}, "suffix '.pt', expected .safetensors"),
        ("a.npz", {"w": np.ones(2)}, "suffix '.npz', expected .safetensors"),
        ("a.safetensors", {"w": np.ones(2, "c16")}, "'w': got complex128"),
        ("a.safetensors", {"w": np.array(["x"])}, "'w': got <U1"),
        ("a.safetensors", {"w": np.array([None])}, "'w': got object"),
        ("a.safetensors", {3: np.ones(2)}, "got 3, expected text"),
    ],
)
def test_what_cannot_be_written_is_named_and_the_old_file_stays(
    tmp_path, name, tensors, words
):
  path = tmp_path / name
  path.write_bytes(b"the old file")
  with pytest.raises(UserError, match=words):
    weight_files.write(str(path), tensors)
  assert path.read_bytes() == b"the old file"
  assert os.listdir(tmp_path) == [name]


def test_nothing_remains_of_a_write_that_fails(tmp_path, monkeypatch):
  def full_disk(*_):
    raise OSError("no space left on device")

  monkeypatch.setattr(os, "replace", full_disk)
  with pytest.raises(OSError, match="no space"):
    weight_files.write(str(tmp_path / "a.safetensors"), {"w": np.ones(2)})
  assert os.listdir(tmp_path) == []


def test_a_bare_file_name_is_enough(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  weight_files.write("a.safetensors", {"w": np.ones(2)})
  assert weight_files.read("a.safetensors").groups[""]["w"].tolist() == [1, 1]


def _safetensors(shape: list[int], size: int) -> bytes:
  """Returns a file of one float32 tensor, of a shape that it may not have."""
  entry = dict(dtype="F32", shape=shape, data_offsets=[0, size])
  header = json.dumps({"a": entry}).encode()
  return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.mark.parametrize(
    "shape, size", [([0, 2**62, 2**62], 0), ([1] * 200, 4), ([3], 4)]
)
def test_safetensors_of_odd_shapes(tmp_path, shape, size):
  path = tmp_path / "a.safetensors"
  path.write_bytes(_safetensors(shape, size))
  with pytest.raises(UserError, match="a.safetensors: .*"):
    weight_files.read(str(path))


def test_a_sparse_file_is_not_read(tmp_path):
  path = tmp_path / "sparse.safetensors"
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", 100) + b"{")
    file.truncate(1 << 32)
  tracemalloc.start()
  try:
    with pytest.raises(UserError, match="sparse.safetensors: .*whole"):
      weight_files.read(str(path))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("reader", ["read_zip", "read_legacy", "read_pickle"])
def test_a_file_beyond_the_memory(tmp_path, monkeypatch, reader):
  def allocate(_):
    raise MemoryError

  monkeypatch.setattr(torch_files, reader, allocate)
  kind = {"read_zip": "state_zip.pt", "read_legacy": "state_legacy.pt",
          "read_pickle": "edm_4.pkl"}[reader]
  with pytest.raises(UserError, match="does not fit into memory"):
    read(kind)
