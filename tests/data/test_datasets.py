"""Data sets by name, and keys that do not go with a name."""

import numpy as np
import pytest

from bcm_jax import train
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import datasets
from bcm_jax.data import decoding
from bcm_jax.data import prepare
from bcm_jax.errors import UserError
from tests import toys
from tests.data import pictures


@pytest.fixture
def paths(tmp_path):
  """The same four images in three classes, as every kind of file."""
  pixels, labels = pictures.write_classes(
      tmp_path / "in", {"a": 2, "b": 1, "c": 1}, height=20, width=24
  )
  np.savez(tmp_path / "x.npz", pixels, np.array(labels))
  prepare.prepare(str(tmp_path / "in"), str(tmp_path / "prepared"), 16)
  return {
      "folder": str(tmp_path / "in"),
      "npz": str(tmp_path / "x.npz"),
      "prepared": str(tmp_path / "prepared"),
  }


@pytest.mark.parametrize("name", ["folder", "npz", "prepared"])
def test_every_kind_gives_the_same_images(paths, name):
  found = datasets.find(name, path=paths[name], size=16)
  assert found.image_shape == (16, 16, 3) and found.num_classes == 3
  source = found.open("train", None)
  assert source.image_shape == found.image_shape
  assert source.num_classes == found.num_classes
  expected = datasets.find("folder", path=paths["folder"], size=16)
  for key, value in expected.open("train", None).fetch(np.arange(4)).items():
    np.testing.assert_array_equal(source.fetch(np.arange(4))[key], value)


@pytest.mark.parametrize("name, shape", [
    ("folder", (20, 24, 3)), ("npz", (20, 24, 3)), ("prepared", (16, 16, 3)),
])
def test_files_are_described_without_decoding_one(
    paths, name, shape, monkeypatch
):
  def never(*_):
    raise AssertionError("decoded")

  monkeypatch.setattr(decoding.Decoder, "__call__", never)
  found = datasets.find(name, path=paths[name])
  assert found.image_shape == shape and found.num_classes == 3


def test_channels(paths):
  found = datasets.find("folder", path=paths["folder"], channels=1)
  assert found.image_shape == (20, 24, 1)
  assert found.open("train", None).fetch(np.arange(1))["image"].shape[-1] == 1


def test_sets_that_need_no_files():
  found = datasets.find("digits")
  assert found.image_shape == (8, 8, 1) and found.num_classes == 10
  assert datasets.find("digits", size=8).image_shape == (8, 8, 1)
  found = datasets.find("none", (4, 4, 3), 7)
  assert found.image_shape == (4, 4, 3) and found.num_classes == 7
  with pytest.raises(UserError, match="'train'"):
    found.open("train", None)


@pytest.mark.parametrize(
    "name, shape, num_classes",
    [
        ("cifar10", (32, 32, 3), 10),
        ("imagenet64", (64, 64, 3), 1000),
        ("imagenet2012", (64, 64, 3), 1000),
    ],
)
def test_published_sets_need_not_be_there(name, shape, num_classes):
  found = datasets.find(name)
  assert found.image_shape == shape and found.num_classes == num_classes
  assert datasets.find(name, size=128).image_shape == (128, 128, 3)


@pytest.mark.parametrize("name", datasets.FILES)
def test_a_path_that_is_missing(name, tmp_path):
  with pytest.raises(UserError, match=f"data.path.*{name}"):
    datasets.find(name)
  path = str(tmp_path / "gone")
  with pytest.raises(UserError, match="data.path.*gone"):
    datasets.find(name, path=path)


@pytest.mark.parametrize("name", datasets.FILES)
def test_files_that_have_gone_are_as_they_were_described(name, tmp_path):
  path = str(tmp_path / "gone")
  found = datasets.find(name, (4, 6, 3), 7, path=path)
  assert found.image_shape == (4, 6, 3) and found.num_classes == 7
  with pytest.raises(UserError, match="data.path.*gone"):
    found.open("train", None)


def test_files_must_be_as_they_were_described(paths):
  path, shape = paths["folder"], (20, 24, 3)
  assert datasets.find("folder", shape, 3, path=path).image_shape == shape
  for other in ((shape, 4), (shape, None), ((20, 20, 3), 3)):
    with pytest.raises(UserError, match=r"\(20, 24, 3\).* 3 "):
      datasets.find("folder", *other, path=path)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(name="folders"), "data.name.*'folder'"),
        (dict(name="digits", path="x"), "data.path.*'x'"),
        (dict(name="cifar10", skip_corrupt=True), "skip_corrupt"),
        (dict(name="digits", size=16), "data.size"),
        (dict(name="cifar10", crop="amd"), "crop.*'amd'.*'adm'"),
        (dict(name="none"), "data.image_shape"),
    ],
)
def test_keys_that_do_not_go_with_a_name(settings, words):
  with pytest.raises(UserError, match=words):
    datasets.find(**settings)


def test_prepared_images_keep_their_size(paths):
  with pytest.raises(UserError, match="16x16"):
    datasets.find("prepared", path=paths["prepared"], size=32)


def test_a_home_folder_is_found(paths, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert datasets.find("folder", path="~/in").num_classes == 3


# Training on a folder.


@pytest.fixture
def config(tmp_path):
  """A tiny network for four gray images in two classes by their names."""
  for k in range(4):
    file = tmp_path / "in" / f"{'ab'[k % 2]}_{k}.png"
    pictures.write(file, pictures.noise(k, channels=1))

  def resolved(**overrides):
    values = toys.TINY | {
        "data.name": "folder", "data.path": str(tmp_path / "in"),
        "data.channels": "1", "model.num_classes": "2",
        "data.labels": "name",
    }
    values |= {k.replace("__", "."): v for k, v in overrides.items()}
    return resolve.resolve(resolve.read_file("digits.py"), values)

  return resolved


@pytest.mark.parametrize("batch_size", [5, 8, 2**20])
def test_a_batch_larger_than_the_set_is_refused_before_the_run_starts(
    config, tmp_path, monkeypatch, batch_size
):
  monkeypatch.setattr(train, "Run", None)
  with pytest.raises(UserError, match=f"batch_size is {batch_size}.*1 to 4"):
    train.train_and_evaluate(
        config(training__batch_size=str(batch_size)), str(tmp_path / "run")
    )
  assert not (tmp_path / "run").exists()


def test_a_config_names_the_source_of_labels(config):
  experiment = build.build(config())
  assert experiment.config.data.num_classes == 2
  assert experiment.source("train").labels.tolist() == [0, 0, 1, 1]


def test_a_conditional_network_without_labels_is_refused_with_the_ways_out(
    config
):
  for shape in ("()", "(8, 8, 1)"):
    with pytest.raises(UserError, match="class folders.*data.labels=name"):
      build.build(config(
          data__labels="auto", data__num_classes="2", data__image_shape=shape
      ))


def test_the_labels_of_a_run_need_not_be_given_for_its_samples(
    config, tmp_path
):
  described = build.build(config()).config
  (tmp_path / "in").rename(tmp_path / "gone")
  assert build.build(described).num_classes == 2
