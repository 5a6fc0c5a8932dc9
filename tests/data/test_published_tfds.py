"""Sets of TFDS, on a tiny one that TFDS writes."""

import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from bcm_jax.data import datasets
from bcm_jax.data import decoding
from bcm_jax.data import prepare
from bcm_jax.data import prepared
from bcm_jax.data import published_tfds
from bcm_jax.data import resizing
from bcm_jax.errors import UserError
from tests.data import pictures

N = {"train": 9, "test": 3, "validation": 4}


def _pixels(split, k):
  """Images of several sizes, as in ImageNet."""
  return pictures.noise(100 * len(split) + k, 32 + 40 * (k % 2), 32 + 8 * k)


class TinyImages(tfds.core.GeneratorBasedBuilder):
  """Noise with three splits and features named as in the published sets."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = tfds.core.Path(__file__)

  def _info(self):
    return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict({
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }),
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in N}

  def _generate_examples(self, split):
    for k in range(N[split]):
      yield k, {
          "file_name": str(k), "image": _pixels(split, k), "label": k % 10
      }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("tfds"))
  tfds.disable_progress_bar()
  TinyImages(data_dir=path).download_and_prepare(file_format="array_record")
  return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """Our names and splits, with the tiny set in place of the published one."""
  names = {
      name: ("tiny_images", splits)
      for name, (_, splits) in published_tfds.NAMES.items()
  }
  assert set(names) == set(datasets.PUBLISHED)
  monkeypatch.setattr(published_tfds, "NAMES", names)


SPLITS = {
    "cifar10": {"train": "train", "test": "test"},
    "imagenet64": {"train": "train", "test": "validation"},
    "imagenet2012": {"train": "train", "test": "validation"},
}


@pytest.mark.parametrize("crop", ["adm", "edm"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SPLITS)
def test_images_come_back_in_their_size(data_dir, name, split, crop):
  found = datasets.find(name, crop=crop)
  size = {"cifar10": 32}.get(name, 64)
  assert found.image_shape == (size, size, 3)
  source = found.open(split, data_dir)
  there = SPLITS[name][split]
  assert len(source) == N[there] and source.name == f"{name}/{split}"
  assert source.image_shape == found.image_shape
  assert source.num_classes == found.num_classes
  ids = np.array([2, 0, 2, 1])
  got = source.fetch(ids)
  for image, k in zip(got["image"], ids, strict=True):
    expected = resizing.BY_NAME[crop](_pixels(there, k), size)
    np.testing.assert_array_equal(image, expected)
  assert got["label"].tolist() == ids.tolist()
  assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(data_dir, threads):
  found = datasets.find("imagenet2012", size=16, threads=threads)
  source = found.open("train", data_dir)
  got = source.fetch(np.arange(9))["image"]
  for k in range(9):
    np.testing.assert_array_equal(
        got[k], resizing.adm(_pixels("train", k), 16)
    )


def test_nothing_asked_nothing_given(data_dir):
  got = datasets.find("cifar10").open("test", data_dir).fetch(np.arange(0))
  assert got["image"].shape == (0, 32, 32, 3) and got["label"].shape == (0,)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_is_an_error(data_dir, index):
  source = datasets.find("cifar10").open("test", data_dir)
  with pytest.raises(IndexError):
    source.fetch(np.array([0, index]))


def test_crop_none_names_the_example(data_dir):
  source = datasets.find("imagenet2012", crop="none").open("train", data_dir)
  with pytest.raises(UserError, match="imagenet2012/train.* 1"):
    source.fetch(np.array([1]))


def test_a_split_that_is_not_there(data_dir):
  with pytest.raises(UserError, match="cifar10.*'tset'"):
    datasets.find("cifar10").open("tset", data_dir)


def test_what_is_not_prepared_says_how(tmp_path):
  with pytest.raises(UserError) as error:
    datasets.find("imagenet2012").open("train", str(tmp_path))
  message = str(error.value)
  assert "tfds build tiny_images --file_format=array_record" in message
  assert f"--data_dir={tmp_path}" in message and "\n" not in message


def test_prepare_takes_the_names_of_tfds(data_dir, tmp_path):
  out = str(tmp_path / "out")
  prepare.prepare("tfds:imagenet2012", out, size=16, data_dir=data_dir)
  found = prepared.data_set(out)
  assert found.num_classes == 1000
  for split, there in SPLITS["imagenet2012"].items():
    source = found.open(split, None)
    assert len(source) == N[there]
    got = source.fetch(np.arange(len(source)))
    for k in range(len(source)):
      np.testing.assert_array_equal(
          got["image"][k], resizing.adm(_pixels(there, k), 16)
      )


@pytest.mark.parametrize("name", SPLITS)
def test_the_published_sets_have_these_features(name, monkeypatch):
  monkeypatch.undo()  # The real names.
  there, splits = published_tfds.NAMES[name]
  assert splits == SPLITS[name]
  features = tfds.builder(
      there, data_dir=os.environ["TFDS_DATA_DIR"]
  ).info.features
  size, num_classes = datasets.PUBLISHED[name]
  assert features["label"].num_classes == num_classes
  expected = (None, None, 3) if name == "imagenet2012" else (size, size, 3)
  assert features["image"].shape == expected


def test_the_decoder_says_the_shape(data_dir):
  source = published_tfds.TFDSSource(
      "cifar10", "test", 10, decoding.Decoder(channels=1, size=8), data_dir
  )
  assert source.image_shape == (8, 8, 1)
  assert source.fetch(np.array([0]))["image"].shape == (1, 8, 8, 1)


def test_photographs_are_not_turned_as_for_the_published_models(monkeypatch):
  monkeypatch.setattr(published_tfds, "TFDSSource", lambda *args: args[3])
  assert not datasets.find("imagenet2012").open("train", None).upright
