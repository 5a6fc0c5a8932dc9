"""Prepared data sets: reading by index, and what is checked."""

import json
import pickle

import numpy as np
import pytest

from bcm_jax.data import prepared
from bcm_jax.errors import UserError
from tests.data import pictures

COUNTS = (5, 1, 7)
N = sum(COUNTS)
SHAPE = (6, 5, 3)


def _images():
  return np.stack([pictures.noise(k, *SHAPE) for k in range(N)])


LABELS = (np.arange(N) * 7) % 4 + 250  # More than a byte holds.


@pytest.fixture
def folder(tmp_path):
  """A train split in three shards."""
  entries, start = [], 0
  for k, count in enumerate(COUNTS):
    part = slice(start, start + count)
    writer = prepared.ShardWriter(str(tmp_path / f"train-{k}"))
    writer.write(_images()[part][:2], LABELS[part][:2])
    writer.write(_images()[part][2:], LABELS[part][2:])
    entries.append(writer.close())
    start += count
  prepared.write_manifest(
      str(tmp_path), image_shape=SHAPE, num_classes=260,
      class_names=[str(k) for k in range(260)],
      splits={"train": {"count": N, "shards": entries}},
  )
  return tmp_path


def _change(folder, change):
  file = folder / "dataset.json"
  manifest = json.loads(file.read_text())
  change(manifest)
  file.write_text(json.dumps(manifest))


def test_it_is_described_by_its_json(folder):
  found = prepared.data_set(str(folder))
  assert found.image_shape == SHAPE and found.num_classes == 260
  assert found.class_names[2] == "2" and found.splits == ("train",)
  source = found.open("train", None)
  assert len(source) == N and source.image_shape == SHAPE
  assert source.num_classes == 260
  assert source.name == f"{folder.name}/train"


def test_fetch_gives_the_asked_examples_in_the_asked_order(folder):
  source = prepared.PreparedSource(str(folder), "train")
  for ids in (np.arange(N), np.array([12, 0, 5, 5, 6, 4]), np.array([5])):
    got = source.fetch(ids)
    np.testing.assert_array_equal(got["image"], _images()[ids])
    np.testing.assert_array_equal(got["label"], LABELS[ids])
    assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32
    assert got["image"].flags.writeable and got["image"].flags.c_contiguous
  assert source.fetch(np.array([], np.int64))["image"].shape == (0, *SHAPE)


@pytest.mark.parametrize("index", [-1, N])
def test_an_index_outside_is_an_error(folder, index):
  with pytest.raises(IndexError):
    prepared.PreparedSource(str(folder), "train").fetch(np.array([0, index]))


def test_a_record_is_the_label_and_the_pixels(folder):
  # What another reader of array_record relies on.
  from array_record.python import array_record_data_source

  files = [str(folder / f"train-{k}") for k in range(len(COUNTS))]
  records = array_record_data_source.ArrayRecordDataSource(files)
  label = int(LABELS[6]).to_bytes(4, "little")
  assert records[6] == label + _images()[6].tobytes()


def test_many_threads_read_at_the_same_time(folder):
  source = prepared.PreparedSource(str(folder), "train")
  assert pictures.fetch_from_threads(source, _images(), LABELS, 2000)


def test_a_copy_of_another_process_is_the_same_source(folder):
  source = prepared.PreparedSource(str(folder), "train")
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(
      copy.fetch(np.arange(N))["image"], _images()
  )


# Bad input.


def test_a_folder_that_is_not_prepared(tmp_path):
  with pytest.raises(UserError, match="dataset.json"):
    prepared.data_set(str(tmp_path))
  assert not prepared.is_prepared(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", '"text'])
def test_a_json_that_cannot_be_read(folder, text):
  (folder / "dataset.json").write_text(text)
  with pytest.raises(UserError, match="dataset.json"):
    prepared.data_set(str(folder))
  assert not prepared.is_prepared(str(folder))


@pytest.mark.parametrize("text", ['{"labels": null}', "[1]", "null"])
def test_the_json_of_something_else(folder, text):
  (folder / "dataset.json").write_text(text)
  with pytest.raises(UserError, match="'bcm_jax images'"):
    prepared.data_set(str(folder))
  assert not prepared.is_prepared(str(folder))


@pytest.mark.parametrize("changes", [
    dict(image_shape=None), dict(image_shape=[6, 5]),
    dict(image_shape=[6, 5, -3]), dict(image_shape=["6", 5, 3]),
    dict(num_classes="260"), dict(num_classes=0), dict(num_classes=2),
    dict(class_names="cat"), dict(class_names=[0] * 260), dict(splits=None),
    dict(splits={}), dict(splits=[]), dict(splits={"train": {}}),
    dict(splits={"train": {"shards": []}}),
    dict(splits={"train": {"shards": [{"file": "train-0"}]}}),
    dict(splits={"train": {"shards": [
        {"file": "../x", "count": 1, "bytes": 1}]}}),
    dict(splits={"train": {"shards": [
        {"file": "train-0", "count": 1.5, "bytes": 1}]}}),
])
def test_a_damaged_json(folder, changes):
  file = folder / "dataset.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(UserError, match="dataset.json"):
    prepared.data_set(str(folder))


def test_records_of_another_length_are_named(folder):
  file = folder / "dataset.json"
  changes = {"image_shape": [60, 50, 3]}
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  source = prepared.PreparedSource(str(folder), "train")
  with pytest.raises(UserError, match="train-0.*bytes"):
    source.fetch(np.arange(2))


def test_another_version(folder):
  _change(folder, lambda m: m.update(version=2))
  with pytest.raises(UserError, match="version 2.* version 1"):
    prepared.data_set(str(folder))


def test_shards_that_are_missing_are_named(folder):
  (folder / "train-1").unlink()
  with pytest.raises(UserError, match="1 of 3 .*train-1"):
    prepared.PreparedSource(str(folder), "train")


def test_a_shard_cut_short_is_named(folder):
  file = folder / "train-2"
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(UserError, match="train-2"):
    prepared.PreparedSource(str(folder), "train")


def test_a_shard_with_other_records_is_named(folder):
  def one_more(manifest):
    manifest["splits"]["train"]["shards"][1]["count"] = 2

  _change(folder, one_more)
  with pytest.raises(UserError, match="train-1.* 2"):
    prepared.PreparedSource(str(folder), "train")


def test_a_changed_pixel_is_found_when_it_is_read(folder):
  file = folder / "train-2"
  content = bytearray(file.read_bytes())
  content[content.index(_images()[7].tobytes()) + 3] ^= 1
  file.write_bytes(content)
  source = prepared.PreparedSource(str(folder), "train")
  np.testing.assert_array_equal(
      source.fetch(np.array([6, 8]))["image"], _images()[[6, 8]]
  )
  with pytest.raises(UserError, match="train-2"):
    source.fetch(np.array([7]))


def test_a_split_that_is_not_there(folder):
  with pytest.raises(UserError, match="'test'.*--holdout"):
    prepared.data_set(str(folder)).open("test", None)
