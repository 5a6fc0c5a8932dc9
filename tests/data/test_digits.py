"""The handwritten digits, with and without TensorFlow."""

import hashlib
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from sklearn import datasets
from sklearn import model_selection

import bcm_jax
from bcm_jax.data import digits
from bcm_jax.data import digits_tfds
from bcm_jax.data import pipeline
from bcm_jax.errors import UserError

SPLITS = ("train", "test")


def _all(source):
  return source.fetch(np.arange(len(source)))


def _assert_same(a, b):
  assert (a.name, a.image_shape, a.num_classes) == (
      b.name,
      b.image_shape,
      b.num_classes,
  )
  assert len(a) == len(b)
  for key in ("image", "label"):
    np.testing.assert_array_equal(_all(a)[key], _all(b)[key])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("tfds")
  digits_tfds.load_digits_tfds("test", str(path))
  return path


@pytest.fixture
def unusable_dir(tmp_path):
  # A folder inside of a file: not writable even for root.
  (tmp_path / "file").write_text("")
  return str(tmp_path / "file" / "tfds")


@pytest.mark.parametrize("split, size", [("train", 1437), ("test", 360)])
def test_split_sizes_and_shapes(split, size):
  source = digits.load_digits(split)
  assert len(source) == size == digits.SPLIT_SIZES[split]
  assert source.image_shape == (8, 8, 1) and source.num_classes == 10
  assert _all(source)["image"].dtype == np.uint8


def test_splits_are_stratified():
  labels = {s: _all(digits.load_digits(s))["label"] for s in SPLITS}
  counts = {s: np.bincount(labels[s]) for s in SPLITS}
  share = counts["test"] / (counts["train"] + counts["test"])
  # 360 / 1797 of each class, to within one example.
  assert np.all(np.abs(share - 360 / 1797) * 1797 / 10 < 1.01)
  assert len(counts["test"]) == 10


def test_split_is_the_published_recipe():
  raw = datasets.load_digits()
  for ours, want in zip(
      SPLITS,
      model_selection.train_test_split(
          raw.target, test_size=360, stratify=raw.target, random_state=0
      ),
      strict=True,
  ):
    assert _all(digits.load_digits(ours))["label"].tolist() == want.tolist()


def test_splits_together_are_all_of_the_digits_once():
  got = np.concatenate([_all(digits.load_digits(s))["image"] for s in SPLITS])
  grey = got.reshape(-1, 64).astype(np.float64) * 16 / 255
  ours = np.rint(grey).astype(int)
  assert np.abs(grey - ours).max() < 16 / 255
  want = datasets.load_digits().data.astype(int)
  assert sorted(map(tuple, ours)) == sorted(map(tuple, want))


def test_grey_levels_are_spread_over_0_to_255():
  levels = np.unique(_all(digits.load_digits("train"))["image"])
  assert levels.tolist() == [round(v * 255 / 16) for v in range(17)]


def test_labels_belong_to_their_images():
  raw = datasets.load_digits()
  pixels = map(bytes, raw.data.astype(np.uint8))
  label_of = dict(zip(pixels, raw.target, strict=True))
  got = _all(digits.load_digits("test"))
  grey = np.rint(got["image"].reshape(-1, 64) * (16 / 255)).astype(np.uint8)
  assert [label_of[bytes(g)] for g in grey] == got["label"].tolist()


@pytest.mark.parametrize("load", [digits.load_digits, digits.digits])
def test_unknown_split_names_the_nearest(load):
  with pytest.raises(UserError, match="'train'"):
    load("trian")


@pytest.mark.parametrize("split", SPLITS)
def test_tfds_and_scikit_learn_agree_index_by_index(split, data_dir):
  _assert_same(
      digits_tfds.load_digits_tfds(split, str(data_dir)),
      digits.load_digits(split),
  )


def test_digits_come_through_tfds_where_it_is_there(data_dir, monkeypatch):
  def refuse(split):
    raise AssertionError("went round TFDS")

  monkeypatch.setattr(digits, "load_digits", refuse)
  assert len(digits.digits("test", str(data_dir))) == 360


def test_tfds_data_dir_is_honoured_and_prepared_once(data_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))

  def refuse(self, split):
    raise AssertionError("prepared again")

  monkeypatch.setattr(digits_tfds.SklearnDigits, "_generate_examples", refuse)
  assert len(digits_tfds.load_digits_tfds("train")) == 1437


def test_tfrecord_copy_is_refused_with_the_folder(tmp_path):
  builder = digits_tfds.SklearnDigits(data_dir=str(tmp_path))
  builder.download_and_prepare(file_format="tfrecord")
  with pytest.raises(UserError) as error:
    digits.digits("train", str(tmp_path))
  message = str(error.value)
  assert str(builder.data_dir) in message and "tfrecord" in message


def test_another_process_may_finish_first(tmp_path, monkeypatch):
  generate = digits_tfds.SklearnDigits._generate_examples
  overtaken = []

  def overtaken_generate(self, split):
    if not overtaken:
      overtaken.append(True)
      digits_tfds.load_digits_tfds("test", str(tmp_path))
    return generate(self, split)

  monkeypatch.setattr(
      digits_tfds.SklearnDigits, "_generate_examples", overtaken_generate
  )
  got = digits_tfds.load_digits_tfds("test", str(tmp_path))
  assert overtaken
  _assert_same(got, digits.load_digits("test"))
  # Neither of the two leaves anything half done behind.
  folders = os.listdir(tmp_path / digits_tfds.SklearnDigits.name)
  assert folders == ["1.0.0"]


@pytest.mark.parametrize("damage", ["records", "info"])
def test_damaged_copy_is_a_user_error(tmp_path, damage):
  folder = tmp_path / digits_tfds.SklearnDigits.name / "1.0.0"
  digits_tfds.load_digits_tfds("test", str(tmp_path))
  if damage == "info":
    (folder / "dataset_info.json").write_text("{")
  else:
    (records,) = folder.glob("*-test.array_record-*")
    records.write_bytes(records.read_bytes()[:1000])
  with pytest.raises(UserError, match=str(tmp_path)):
    digits_tfds.load_digits_tfds("test", str(tmp_path))


def test_folder_that_cannot_be_written(unusable_dir, monkeypatch, caplog):
  with pytest.raises(UserError, match=unusable_dir):
    digits.digits("test", unusable_dir)
  monkeypatch.setenv("TFDS_DATA_DIR", unusable_dir)
  with caplog.at_level("WARNING", logger="absl"):
    got = digits.digits("test")
  _assert_same(got, digits.load_digits("test"))
  assert "TFDS folder cannot be used" in caplog.text


@pytest.mark.slow
def test_without_tensorflow_the_same_digits():
  program = textwrap.dedent("""
      import hashlib, sys

      class Blocker:
        def find_spec(self, name, path=None, target=None):
          if name.split('.')[0] == 'tensorflow':
            raise ModuleNotFoundError(f'blocked: {name}', name=name)

      sys.meta_path.insert(0, Blocker())
      from bcm_jax.data import digits, pipeline
      for split in ('train', 'test'):
        source = digits.digits(split)
        got = source.fetch(pipeline.epoch_permutation(0, 0, len(source)))
        data = got['image'].tobytes() + got['label'].tobytes()
        print(hashlib.sha256(data).hexdigest())
      assert 'tensorflow' not in sys.modules
  """)
  digests = subprocess.run(
      [sys.executable, "-c", program],
      check=True,
      capture_output=True,
      text=True,
      cwd=pathlib.Path(bcm_jax.__file__).parents[1],
  ).stdout.split()
  assert digests == [_digest(split) for split in SPLITS]


def _digest(split):
  source = digits.load_digits(split)
  got = source.fetch(pipeline.epoch_permutation(0, 0, len(source)))
  data = got["image"].tobytes() + got["label"].tobytes()
  return hashlib.sha256(data).hexdigest()
