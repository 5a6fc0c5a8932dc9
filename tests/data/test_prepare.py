"""The prepare command: what goes in comes out, whole or not at all."""

import hashlib
import json
import pathlib
import zipfile

import numpy as np
import pytest

from bcm_jax.data import datasets
from bcm_jax.data import decoding
from bcm_jax.data import encoded
from bcm_jax.data import folder
from bcm_jax.data import prepare
from bcm_jax.data import prepared
from bcm_jax.errors import UserError
from tests.data import pictures


@pytest.fixture
def images(tmp_path):
  """30 images of several sizes in two classes, 3 more for the test."""
  root = tmp_path / "in"
  for k in range(30):
    pixels = pictures.noise(k, 20 + k % 7, 20 + k % 5)
    pictures.write(root / "train" / "ab"[k % 2] / f"{k}.png", pixels)
  pictures.write_classes(root / "test", {"a": 1, "b": 2})
  return root


def _all(source):
  return source.fetch(np.arange(len(source)))


def _same(a, b):
  assert len(a) == len(b) and a.image_shape == b.image_shape
  assert a.num_classes == b.num_classes
  for key, value in _all(a).items():
    np.testing.assert_array_equal(_all(b)[key], value)


def _digests(path):
  return {
      file.name: hashlib.sha256(file.read_bytes()).hexdigest()
      for file in path.iterdir()
  }


@pytest.mark.parametrize("crop", ["adm", "edm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_comes_back_example_by_example(
    images, tmp_path, crop, channels
):
  out = str(tmp_path / "out")
  text = prepare.prepare(str(images), out, 16, crop, channels=channels)
  assert f"train 30, test 3 images of 16x16x{channels}, 2 classes" in text
  decoder = decoding.Decoder(channels, 16, crop)
  expected = folder.data_set(str(images), decoder)
  found = datasets.find("prepared", path=out)
  assert found.image_shape == (16, 16, channels)
  assert found.class_names == ("a", "b") and found.num_classes == 2
  for split in ("train", "test"):
    _same(found.open(split, None), expected.open(split, None))


def test_without_a_size_images_stay_as_they_are(tmp_path):
  pixels, labels = pictures.write_classes(
      tmp_path / "in", {"a": 2, "b": 3}, height=5, width=9
  )
  prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
  found = prepared.data_set(str(tmp_path / "out"))
  got = _all(found.open("train", None))
  np.testing.assert_array_equal(got["image"], pixels)
  assert got["label"].tolist() == labels and found.splits == ("train",)


def test_npz_and_zip_come_back(tmp_path):
  pixels = np.stack([pictures.noise(k) for k in range(4)])
  labels = np.array([1, 0, 2, 1])
  np.savez(tmp_path / "x.npz", pixels, labels)
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    for k in range(4):
      archive.writestr(f"{k}.png", pictures.encode(pixels[k]))
    table = [[f"{k}.png", int(labels[k])] for k in range(4)]
    archive.writestr("dataset.json", json.dumps({"labels": table}))
  for name in ("npz", "zip"):
    out = tmp_path / f"{name}-out"
    prepare.prepare(str(tmp_path / f"x.{name}"), str(out))
    source = prepared.PreparedSource(str(out), "train")
    got = _all(source)
    np.testing.assert_array_equal(got["image"], pixels)
    np.testing.assert_array_equal(got["label"], labels)
    assert source.num_classes == 3


def test_images_without_classes(tmp_path):
  pictures.write(tmp_path / "in" / "0.png", pictures.noise(0))
  text = prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
  assert "no classes" in text
  found = prepared.data_set(str(tmp_path / "out"))
  assert found.num_classes is None and found.class_names is None


def test_the_bytes_do_not_depend_on_workers_or_place(
    images, tmp_path, monkeypatch
):
  prepare.prepare(str(images), str(tmp_path / "one"), 16, workers=1)
  prepare.prepare(str(images), str(tmp_path / "two"), 16, workers=2)
  (tmp_path / "else").mkdir()
  images = images.rename(tmp_path / "else" / "in")
  # Nor on how many images are decoded at a time.
  monkeypatch.setattr(prepare, "_BLOCK", 7)
  prepare.prepare(str(images), str(tmp_path / "deep" / "er"), 16, workers=5)
  expected = _digests(tmp_path / "one")
  assert set(expected) == {
      "dataset.json", "train-00000-of-00001.array_record",
      "test-00000-of-00001.array_record",
  }
  assert _digests(tmp_path / "two") == expected
  assert _digests(tmp_path / "deep" / "er") == expected


def test_shards_are_as_large_as_asked_and_their_json_is_true(tmp_path):
  pixels = np.stack([pictures.noise(k, 128, 128) for k in range(50)])
  np.savez(tmp_path / "x.npz", pixels, np.arange(50))
  out = tmp_path / "out"
  prepare.prepare(str(tmp_path / "x.npz"), str(out), shard_mb=1)
  manifest = json.loads((out / "dataset.json").read_text())
  shards = manifest["splits"]["train"]["shards"]
  # 21 records of 4 + 128 * 128 * 3 bytes in a MiB.
  assert [s["count"] for s in shards] == [21, 21, 8]
  assert [s["file"] for s in shards] == [
      f"train-{k:05d}-of-00003.array_record" for k in range(3)
  ]
  digests = _digests(out)
  for shard in shards:
    assert shard["sha256"] == digests[shard["file"]]
    assert shard["bytes"] == (out / shard["file"]).stat().st_size
  got = _all(prepared.PreparedSource(str(out), "train"))
  np.testing.assert_array_equal(got["image"], pixels)
  np.testing.assert_array_equal(got["label"], np.arange(50))


def test_a_holdout_parts_train(tmp_path):
  pixels = np.stack([pictures.noise(k) for k in range(20)])
  np.savez(tmp_path / "x.npz", pixels, np.arange(20))
  for out in ("out", "again"):
    prepare.prepare(
        str(tmp_path / "x.npz"), str(tmp_path / out), holdout=6
    )
  found = prepared.data_set(str(tmp_path / "out"))
  train, test = (_all(found.open(s, None)) for s in ("train", "test"))
  assert (len(train["label"]), len(test["label"])) == (14, 6)
  together = np.concatenate([train["label"], test["label"]])
  assert sorted(together) == list(range(20))
  for part in (train, test):
    np.testing.assert_array_equal(part["image"], pixels[part["label"]])
  # Neither the first nor the last of a folder, which would be one class.
  assert test["label"].max() - test["label"].min() > 6
  assert _digests(tmp_path / "out") == _digests(tmp_path / "again")


def test_corrupt_images_are_left_out_and_told(images, tmp_path):
  (images / "train" / "a" / "4.png").write_bytes(b"no image")
  out = str(tmp_path / "out")
  with pytest.raises(UserError, match="a/4.png"):
    prepare.prepare(str(images), out, 16)
  text = prepare.prepare(str(images), out, 16, skip_corrupt=True)
  assert "train 29, test 3" in text and "1 files skipped" in text
  manifest = json.loads(pathlib.Path(out, "dataset.json").read_text())
  assert manifest["made"]["skipped"] == ["train/a/4.png"]
  assert manifest["made"]["source"] == "in"
  assert len(prepared.PreparedSource(out, "train")) == 29


# Whole or not at all.


def _all_files(path):
  return {str(file) for file in path.rglob("*")}


def test_an_interrupted_run_leaves_nothing(images, tmp_path, monkeypatch):
  before = _all_files(tmp_path)
  fetch = encoded.EncodedSource.fetch
  seen = []

  def interrupted(self, indices):
    if len(self) == 3:  # Of the last split: shards of train are there.
      seen.extend(file.name for file in tmp_path.rglob("*.array_record"))
      assert not list(tmp_path.rglob("dataset.json"))
      raise KeyboardInterrupt
    return fetch(self, indices)

  monkeypatch.setattr(encoded.EncodedSource, "fetch", interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(str(images), str(tmp_path / "out"), 16)
  assert "train-00000-of-00001.array_record" in seen
  assert _all_files(tmp_path) == before


def test_a_failed_overwrite_leaves_the_old_one(images, tmp_path):
  out = tmp_path / "out"
  prepare.prepare(str(images), str(out), 16)
  expected = _digests(out)
  (images / "test" / "a" / "000.png").write_bytes(b"no image")
  with pytest.raises(UserError, match="000.png"):
    prepare.prepare(str(images), str(out), 16, overwrite=True)
  assert _digests(out) == expected
  assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_only_a_prepared_folder_is_replaced_and_only_where_asked(
    images, tmp_path
):
  out = tmp_path / "out"
  out.mkdir()  # An empty folder is free.
  prepare.prepare(str(images), str(out), 16)
  with pytest.raises(UserError, match="--overwrite"):
    prepare.prepare(str(images), str(out), 8)
  prepare.prepare(str(images), str(out), 8, overwrite=True)
  assert prepared.data_set(str(out)).image_shape == (8, 8, 3)
  assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
  (out / "dataset.json").unlink()
  for overwrite in (False, True):
    with pytest.raises(UserError, match="out"):
      prepare.prepare(str(images), str(out), 8, overwrite=overwrite)


# Labels.


def test_the_summary_has_the_source_and_the_class_of_each_label(tmp_path):
  for k in (0, 1, 2, 10):
    pictures.write(tmp_path / "in" / str(k) / "0.png", pictures.noise(k))
  (tmp_path / "in" / "2").rename(tmp_path / "in" / "2\nb")
  text = prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"))
  assert "from class folders: 0 0, 1 1, 2 2\\nb, 3 10\n" in text
  assert text.splitlines()[0].startswith("train 4 images")
  assert prepared.data_set(str(tmp_path / "out")).class_names[2] == "2\nb"


def test_a_source_of_labels_is_passed_on(tmp_path):
  for name in ("dog_1", "cat_1", "dog_2"):
    pictures.write(tmp_path / "in" / f"{name}.png", pictures.noise(0))
  out = tmp_path / "out"
  prepare.main([str(tmp_path / "in"), str(out), "--labels=name"])
  source = prepared.PreparedSource(str(out), "train")
  assert _all(source)["label"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("labels", [[1, 2, 2, 3], [0, 2, 2, 5], [7, 7, 7, 7]])
def test_labels_with_gaps_need_a_choice(tmp_path, labels):
  pixels = np.stack([pictures.noise(k) for k in range(4)])
  file = str(tmp_path / "x.npz")
  np.savez(file, pixels, np.array(labels))
  with pytest.raises(UserError, match="class .* of .*--gaps=close"):
    prepare.prepare(file, str(tmp_path / "out"))
  prepare.prepare(file, str(tmp_path / "keep"), gaps="keep")
  source = prepared.PreparedSource(str(tmp_path / "keep"), "train")
  assert _all(source)["label"].tolist() == labels
  prepare.prepare(file, str(tmp_path / "close"), gaps="close")
  found = prepared.data_set(str(tmp_path / "close"))
  present = sorted(set(labels))
  assert found.class_names == tuple(map(str, present))
  assert found.num_classes == len(present)
  got = _all(found.open("train", None))
  assert [present[k] for k in got["label"]] == labels


def test_a_closed_gap_is_no_class_of_the_test_split(tmp_path):
  pixels = np.stack([pictures.noise(k) for k in range(3)])
  (tmp_path / "in").mkdir()
  np.savez(tmp_path / "in" / "Train.npz", pixels, np.array([0, 2, 3]))
  np.savez(tmp_path / "in" / "valid.npz", pixels, np.array([0, 1, 3]))
  with pytest.raises(UserError, match="label 1 of .*valid.npz"):
    prepare.prepare(str(tmp_path / "in"), str(tmp_path / "out"), gaps="close")


# Disks.


@pytest.mark.parametrize("step", ["open", "write", "close", "manifest"])
def test_a_full_disk_ends_with_74_and_leaves_nothing(
    tmp_path, monkeypatch, step
):
  pictures.write(tmp_path / "in" / "0.png", pictures.noise(0))
  full = OSError(28, "No space left on device")

  class Writer:

    def __init__(self, path, options):
      self.write = self._at("write")
      self.close = self._at("close")
      self._at("open")()
      open(path, "wb").close()

    def _at(self, name):
      def call(*_):
        if name == step:
          raise RuntimeError(f"write() failed: {full}")
      return call

  monkeypatch.setattr(
      prepared.array_record_module, "ArrayRecordWriter", Writer
  )

  def write_json(*_):
    raise full

  monkeypatch.setattr(prepared.files, "write_json", write_json)
  with pytest.raises(SystemExit) as end:
    prepare.main([str(tmp_path / "in"), str(tmp_path / "out")])
  assert end.value.code == 74
  assert [p.name for p in tmp_path.iterdir()] == ["in"]


# Bad input.


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(holdout=3), "--holdout"),
        (dict(workers=0), "--workers"),
        (dict(shard_mb=0), "--shard_mb"),
        (dict(size=None), "--size"),
        (dict(crop="none"), "16x16"),
        (dict(channels=2), "channels.*2"),
        (dict(size=0), "size.*0"),
        (dict(size=10**9), "size.*1000000000"),
        (dict(labels="dog"), "labels.*'dog'"),
        (dict(gaps="yes"), "--gaps.*'yes'"),
    ],
)
def test_settings_that_cannot_be(images, tmp_path, settings, words):
  with pytest.raises(UserError, match=words):
    prepare.prepare(
        str(images), str(tmp_path / "out"), **({"size": 16} | settings)
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("holdout", [-1, 4, 5])
def test_a_holdout_that_leaves_nothing(tmp_path, holdout):
  np.savez(tmp_path / "x.npz", np.stack([pictures.noise(0)] * 4))
  with pytest.raises(UserError, match=f"--holdout.*{holdout}.*1 to 3"):
    prepare.prepare(
        str(tmp_path / "x.npz"), str(tmp_path / "out"), holdout=holdout
    )


@pytest.mark.parametrize(
    "source, words",
    [
        ("missing", "missing"),
        ("missing.zip", "missing.zip"),
        ("tfds:cifar", "'tfds:cifar'.*'tfds:cif"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, source, words):
  with pytest.raises(UserError, match=words):
    prepare.prepare(source, str(tmp_path / "out"))


@pytest.mark.parametrize("out", ["", "in/out", "in/a/b", "link/out"])
def test_outputs_that_would_be_read_as_images(tmp_path, out):
  pictures.write(tmp_path / "in" / "0.png", pictures.noise(0))
  (tmp_path / "link").symlink_to(tmp_path / "in")
  with pytest.raises(UserError, match="OUT"):
    prepare.prepare(str(tmp_path / "in"), out and str(tmp_path / out))


def test_a_prepared_folder_is_no_input(images, tmp_path):
  prepare.prepare(str(images), str(tmp_path / "out"), 16)
  with pytest.raises(UserError, match="out"):
    prepare.prepare(str(tmp_path / "out"), str(tmp_path / "again"))


def test_kinds_of_input(tmp_path):
  assert prepare.kind_of("tfds:imagenet_resized/64x64") == ("imagenet64", None)
  assert prepare.kind_of("tfds:imagenet2012") == ("imagenet2012", None)
  assert prepare.kind_of("tfds:cifar10") == ("cifar10", None)
  assert prepare.kind_of(str(tmp_path)) == ("folder", str(tmp_path))
  assert prepare.kind_of("a/x.zip") == ("zip", "a/x.zip")
  assert prepare.kind_of("a/X.ZIP") == ("zip", "a/X.ZIP")
  (tmp_path / "train.txt").touch()
  assert prepare.kind_of(str(tmp_path)) == ("folder", str(tmp_path))
  (tmp_path / "Training.zip").touch()
  assert prepare.kind_of(str(tmp_path)) == ("zip", str(tmp_path))
  (tmp_path / "Training.zip").unlink()
  (tmp_path / "train.npz").touch()
  assert prepare.kind_of(str(tmp_path)) == ("npz", str(tmp_path))


# The command.


def test_the_command_writes(images, tmp_path, capsys):
  out = tmp_path / "out"
  prepare.main([str(images), str(out), "--size=16", "--crop=edm"])
  shown = capsys.readouterr()
  assert f"written: {out}" in shown.out
  assert "images/s" in shown.err
  assert prepared.data_set(str(out)).image_shape == (16, 16, 3)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size=16", "--crop=amd"], "'amd'"),
        (["--size=big"], "'big'"),
        (["--sise=16"], "--sise=16"),
        ([], "--size"),
    ],
)
def test_the_command_ends_with_65_and_one_line(
    images, tmp_path, capsys, flags, words
):
  with pytest.raises(SystemExit) as end:
    prepare.main([str(images), str(tmp_path / "out"), *flags])
  assert end.value.code == 65
  line = capsys.readouterr().err.split("error: ")[1]
  assert words in line and line.count("\n") == 1
