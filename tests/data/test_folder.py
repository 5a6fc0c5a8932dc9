"""Folders of images, good and bad."""

import os
import pickle

import numpy as np
import pytest

from bcm_jax.data import decoding
from bcm_jax.data import folder
from bcm_jax.errors import UserError
from tests.data import pictures


def _open(path, split="train", decoder=None, **options):
  decoder = decoder or decoding.Decoder()
  return folder.data_set(str(path), decoder, **options).open(split, None)


def _all(source):
  return source.fetch(np.arange(len(source)))


@pytest.fixture
def classes(tmp_path):
  """Classes b, a and C under train/ and two of them under val/."""
  train = pictures.write_classes(tmp_path / "train", {"b": 3, "a": 2, "C": 2})
  test = pictures.write_classes(tmp_path / "val", {"b": 2, "a": 1})
  return tmp_path, train, test


def test_classes_are_numbered_by_name(classes):
  path, (pixels, labels), _ = classes
  found = folder.data_set(str(path), decoding.Decoder())
  assert found.class_names == ("C", "a", "b")
  assert found.image_shape == (8, 8, 3) and found.num_classes == 3
  assert found.splits == ("train", "test")
  source = found.open("train", None)
  assert (len(source), source.num_classes) == (7, 3)
  assert source.image_shape == (8, 8, 3) and source.name == "folder/train"
  got = _all(source)
  np.testing.assert_array_equal(got["image"], pixels)
  assert got["label"].tolist() == labels
  assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32


def test_fetch_gives_the_asked_examples_in_the_asked_order(classes):
  path, (pixels, labels), _ = classes
  for threads in (1, 2, 5):
    got = _open(path, threads=threads).fetch(np.array([5, 0, 5, 6, 2]))
    np.testing.assert_array_equal(got["image"], pixels[[5, 0, 5, 6, 2]])
    assert got["label"].tolist() == [labels[i] for i in (5, 0, 5, 6, 2)]
  nothing = _open(path).fetch(np.array([], np.int64))
  assert nothing["image"].shape == (0, 8, 8, 3)


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_is_an_error(classes, index):
  with pytest.raises(IndexError):
    _open(classes[0]).fetch(np.array([0, index]))


def test_the_test_split_has_the_labels_of_train(classes):
  path, _, (pixels, _) = classes
  source = _open(path, "test")
  assert source.num_classes == 3
  got = _all(source)
  np.testing.assert_array_equal(got["image"], pixels)
  assert got["label"].tolist() == [1, 2, 2]


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_names_of_the_test_split(tmp_path, name):
  pictures.write(tmp_path / "train" / "0.png", pictures.noise(0))
  expected = pictures.write(tmp_path / name / "0.png", pictures.noise(1))
  np.testing.assert_array_equal(
      _all(_open(tmp_path, "test"))["image"][0], expected
  )


def test_the_test_folder_comes_before_the_validation_folder(tmp_path):
  for k, name in enumerate(("train", "val", "test")):
    pictures.write(tmp_path / name / "0.png", pictures.noise(k))
  np.testing.assert_array_equal(
      _all(_open(tmp_path, "test"))["image"][0], pictures.noise(2)
  )


def test_images_without_classes(tmp_path):
  for k in range(3):
    pictures.write(tmp_path / f"{k}.png", pictures.noise(k))
  found = folder.data_set(str(tmp_path), decoding.Decoder())
  assert found.num_classes is None and found.class_names is None
  assert found.splits == ("train",)
  source = found.open("train", None)
  assert source.num_classes is None
  assert _all(source)["label"].tolist() == [0, 0, 0]


def test_the_order_is_that_of_names_and_not_of_the_file_system(
    tmp_path, monkeypatch
):
  paths = ["a/2.png", "a/10.png", "a/deep/er/1.png", "b/0.png", "a/Z.png"]
  for k, path in enumerate(paths):
    pictures.write(tmp_path / path, pictures.noise(k))
  forward = _open(tmp_path)
  scandir = os.scandir

  class Backward:

    def __init__(self, path):
      with scandir(path) as entries:
        self._entries = sorted(entries, key=lambda e: e.name, reverse=True)

    def __enter__(self):
      return iter(self._entries)

    def __exit__(self, *_):
      pass

  monkeypatch.setattr(os, "scandir", Backward)
  assert _open(tmp_path).files == forward.files == (
      "a/10.png", "a/2.png", "a/Z.png", "a/deep/er/1.png", "b/0.png"
  )
  assert forward.labels.tolist() == [0, 0, 0, 0, 1]


def test_any_ending_counts_and_hidden_things_do_not(tmp_path):
  for name in ("1.JPG", "2.jpeg", "3.PnG", "4.webp", "5.bmp"):
    pictures.write(tmp_path / "a" / name, pictures.noise(0))
  for name in (".6.png", "notes.txt", ".hidden/7.png"):
    pictures.write(tmp_path / "a" / name, pictures.noise(0))
  pictures.write(tmp_path / ".cache" / "8.png", pictures.noise(0))
  (tmp_path / "README.md").write_text("no image")
  assert len(_open(tmp_path)) == 5


def test_sizes_are_made_equal_where_asked(tmp_path):
  a = pictures.write(tmp_path / "a.png", pictures.noise(0, 20, 30))
  b = pictures.write(tmp_path / "b.png", pictures.noise(1, 40, 16))
  for crop in ("adm", "edm"):
    decoder = decoding.Decoder(size=16, crop=crop)
    got = _all(_open(tmp_path, decoder=decoder))["image"]
    for image, pixels in zip(got, (a, b), strict=True):
      content = pictures.encode(pixels)
      np.testing.assert_array_equal(image, decoder(content, ""))


def test_grey_where_asked(tmp_path):
  pixels = pictures.write(tmp_path / "a.png", pictures.noise(0, channels=1))
  source = _open(tmp_path, decoder=decoding.Decoder(channels=1))
  assert source.image_shape == (8, 8, 1)
  np.testing.assert_array_equal(_all(source)["image"][0], pixels)


def test_a_copy_of_another_process_is_the_same_source(classes):
  source = _open(classes[0])
  copy = pickle.loads(pickle.dumps(source))
  for key, value in _all(source).items():
    np.testing.assert_array_equal(_all(copy)[key], value)


# Bad input.


def test_no_folder(tmp_path):
  with pytest.raises(UserError, match="missing"):
    _open(tmp_path / "missing")


def test_no_image(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "notes.txt").write_text("no image")
  with pytest.raises(UserError, match=".jpg"):
    _open(tmp_path)


def test_a_class_without_images_is_named(classes):
  (classes[0] / "train" / "empty" / "deep").mkdir(parents=True)
  with pytest.raises(UserError, match="train/empty"):
    _open(classes[0])


def test_images_of_two_sizes_are_named_with_their_sizes(tmp_path):
  for k, width in enumerate((8, 8, 9, 7)):
    pictures.write(tmp_path / f"{k}.png", pictures.noise(0, 8, width))
  source = _open(tmp_path)
  assert len(source.fetch(np.array([0, 1]))["image"]) == 2
  with pytest.raises(UserError) as error:
    _all(source)
  message = str(error.value)
  assert f"{tmp_path}/0.png" in message and "8x8" in message
  assert f"{tmp_path}/2.png" in message and "8x9" in message
  assert "3.png" not in message and "data.size" in message


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_a_corrupt_image_is_named_on_fetch(classes, content):
  path = classes[0]
  file = path / "train" / "a" / "001.png"
  file.write_bytes(file.read_bytes()[:-40] if content == "cut" else content)
  source = _open(path)
  assert len(source.fetch(np.array([0, 1, 2]))["image"]) == 3
  with pytest.raises(UserError, match=str(file)):
    _all(source)


def test_a_file_that_went_away_is_named_and_never_skipped(classes):
  path = classes[0]
  source = _open(path)
  (path / "train" / "a" / "001.png").unlink()
  with pytest.raises(UserError, match="001.png") as error:
    _all(source)
  assert not isinstance(error.value, decoding.CorruptImage)


def test_corrupt_images_are_left_out_where_asked(classes, caplog):
  path, (pixels, labels), _ = classes
  bad = ["C/000.png", "b/001.png"]  # The first of all is one of them.
  for name in bad:
    (path / "train" / name).write_bytes(b"no image")
  source = _open(path, skip_corrupt=True)
  good = [1, 2, 3, 4, 6]
  assert len(source) == 5 and source.skipped == tuple(bad)
  got = _all(source)
  np.testing.assert_array_equal(got["image"], pixels[good])
  assert got["label"].tolist() == [labels[i] for i in good]
  # The same index is the same image however it is asked for.
  np.testing.assert_array_equal(
      source.fetch(np.array([4, 1]))["image"], pixels[[6, 2]]
  )
  assert "skipped 2 of 7 files" in caplog.text and bad[1] in caplog.text


def test_nothing_but_corrupt_images(tmp_path):
  for k in range(3):
    (tmp_path / f"{k}.png").write_bytes(b"no image")
  with pytest.raises(UserError, match="0.png"):
    _open(tmp_path, skip_corrupt=True)
  with pytest.raises(UserError, match="3 .*0.png"):
    _open(tmp_path, decoder=decoding.Decoder(size=8), skip_corrupt=True)


def test_images_of_two_sizes_are_not_corrupt(tmp_path):
  for k, width in enumerate((8, 9)):
    pictures.write(tmp_path / f"{k}.png", pictures.noise(0, 8, width))
  with pytest.raises(UserError, match="data.size"):
    _open(tmp_path, skip_corrupt=True)


def test_images_beside_class_folders(classes):
  path = classes[0]
  pictures.write(path / "train" / "loose.png", pictures.noise(0))
  with pytest.raises(UserError, match="loose.png.*'C'"):
    _open(path)


def test_a_folder_that_may_be_a_split_or_a_class(tmp_path):
  pictures.write_classes(tmp_path, {"train": 1, "car": 1})
  with pytest.raises(UserError, match="'train'.*'car'"):
    _open(tmp_path)


def test_a_class_that_train_does_not_have(classes):
  pictures.write(classes[0] / "val" / "new" / "0.png", pictures.noise(0))
  with pytest.raises(UserError, match="val.*'new'"):
    _open(classes[0], "test")


def test_a_test_split_without_the_classes_of_train(tmp_path):
  pictures.write_classes(tmp_path / "train", {"a": 1})
  pictures.write(tmp_path / "test" / "0.png", pictures.noise(0))
  with pytest.raises(UserError, match="/test"):
    _open(tmp_path, "test")


def test_splits_that_are_not_there(tmp_path):
  pictures.write(tmp_path / "0.png", pictures.noise(0))
  with pytest.raises(UserError, match="'test'.*--holdout"):
    _open(tmp_path, "test")
  with pytest.raises(UserError, match="'trian'.*'train'"):
    _open(tmp_path, "trian")
