"""The command that trains a classifier: on stripes, in a few steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.data import image_source
from bcm_jax.metrics import classifier
from bcm_jax.tools import train_classifier
from tests import quick

pytestmark = pytest.mark.slow

STEPS = 30
FLAGS = [f"--steps={STEPS}", "--batch_size=16", "--learning_rate=0.005"]


def stripes(count, seed):
  """Grey 8x8 images: stripes across (0), upright (1) or none (2), in noise."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, count)
  rows = np.indices((8, 8))
  wave = np.stack([rows[0] % 2, rows[1] % 2, np.full((8, 8), 0.5)])
  images = 60 + 100 * wave[labels] + rng.integers(0, 60, (count, 8, 8))
  return images[..., None].astype(np.uint8), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with train.npz and test.npz."""
  folder = tmp_path_factory.mktemp("data") / "stripes"
  folder.mkdir()
  for seed, (split, count) in enumerate([("train", 96), ("test", 60)]):
    images, labels = stripes(count, seed)
    np.savez(folder / f"{split}.npz", images=images, labels=labels)
  return folder


def arguments(data, out, *extra):
  return [
      "--config=configs/digits.py", "--config.data.name=npz",
      f"--config.data.path={data}", "--config.model.num_classes=none",
      f"--out={out}", *FLAGS, *extra,
  ]


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
  """The folder of a trained classifier."""
  out = tmp_path_factory.mktemp("out") / "deep" / "classifier"
  train_classifier.main(arguments(data, out))
  return out


def fails(capsys, *argv) -> str:
  """Runs a command that must fail on bad input; returns its one line."""
  with pytest.raises(SystemExit) as done:
    train_classifier.main(list(argv))
  assert done.value.code == errors.EXIT_BAD_INPUT
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith("error: ")
  return lines[-1]


def test_separable_images_are_learnt(out, data):
  facts = json.loads((out / "classifier.json").read_text())
  assert facts["test_accuracy"] > 0.95
  assert facts["test_images"] == 60
  found = classifier.load_classifier(str(out))
  with np.load(data / "test.npz") as test:
    right = found.classify(test["images"]) == test["labels"]
  assert np.mean(right) == facts["test_accuracy"]


def test_the_classifier_says_what_it_is(out, data):
  facts = json.loads((out / "classifier.json").read_text())
  found = classifier.load_classifier(str(out))
  assert facts["name"] == found.name == "stripes ResNet"
  assert found.distance == "FD (stripes ResNet)"
  assert facts["digest"] == found.digest
  train = image_source.ArraySource(*stripes(96, 0), 3)
  assert facts["data"] == {
      "name": "stripes", "digest": image_source.fingerprint(train), "images": 96
  }
  assert facts["image_shape"] == [8, 8, 1]
  assert facts["network"]["num_classes"] == 3
  told = facts["training"]
  assert (told["steps"], told["batch_size"], told["seed"]) == (STEPS, 16, 0)
  assert (told["flip"], told["crop"]) == (False, 1)
  assert {"bcm_jax", "commit", "jax", "flax", "hardware"} <= set(facts)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    out, data, tmp_path
):
  def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

  train_classifier.main(arguments(data, tmp_path))
  before = contents(tmp_path)
  assert before == contents(out)
  assert set(before) == {"classifier.json", "classifier.safetensors"}
  train_classifier.main(arguments(data, tmp_path, "--seed=1", "--overwrite"))
  after = contents(tmp_path)
  assert after["classifier.safetensors"] != before["classifier.safetensors"]


def test_no_test_split_is_said(data, tmp_path, capsys):
  argv = arguments(
      data / "train.npz", tmp_path, "--name=my features"
  )
  train_classifier.main(argv)
  told = capsys.readouterr()
  assert "accuracy will not be measured: " in told.err
  assert "no test split" in told.out
  facts = json.loads((tmp_path / "classifier.json").read_text())
  assert facts["test_accuracy"] is None
  assert facts["name"] == "my features"


def test_a_classifier_is_not_overwritten_unasked(out, data, capsys):
  before = (out / "classifier.safetensors").read_bytes()
  line = fails(capsys, *arguments(data, out))
  assert str(out) in line and "--overwrite" in line
  assert (out / "classifier.safetensors").read_bytes() == before


def save(path, count=20, side=8, labels=True):
  found = dict(images=np.zeros((count, side, side, 1), np.uint8))
  if labels:
    found["labels"] = np.arange(count) % 2
  np.savez(path, **found)
  return path


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--stps=3"], "--stps=3"),
        (["--steps=many"], "'many'"),
        (["--steps=0"], "--steps"),
        (["--batch_size=0"], "--batch_size"),
        (["--batch_size=21"], "batch_size"),
        (["--seed=-1"], "--seed"),
        (["--learning_rate=0"], "--learning_rate"),
        (["--learning_rate=nan"], "--learning_rate"),
        (["--config.data.nam=x"], "'data.name'"),
    ],
)
def test_bad_flags_speak(extra, words, tmp_path, capsys):
  path = save(tmp_path / "images.npz")
  out = tmp_path / "out"
  assert words in fails(capsys, *arguments(path, out, *extra))
  assert not (out / "classifier.json").exists()


def test_missing_flags_speak(capsys, tmp_path):
  line = fails(capsys, "--config=configs/digits.py")
  assert "--out" in line
  assert "--config" in fails(capsys, f"--out={tmp_path}")


def test_images_without_labels_are_refused(tmp_path, capsys):
  path = save(tmp_path / "images.npz", labels=False)
  line = fails(capsys, *arguments(path, tmp_path / "out"))
  assert "labels" in line


def test_tiny_images_are_refused(tmp_path, capsys):
  path = save(tmp_path / "images.npz", side=6)
  line = fails(capsys, *arguments(path, tmp_path / "out"))
  assert "6x6" in line


def test_a_folder_that_cannot_be_written_is_found_first(
    data, tmp_path, capsys
):
  (tmp_path / "file").write_text("")
  line = fails(capsys, *arguments(data, tmp_path / "file" / "out"))
  assert "--out" in line


def test_a_loss_that_is_not_finite_stops_it(data, tmp_path, capsys):
  argv = arguments(data, tmp_path, "--learning_rate=1e30")
  assert "--learning_rate" in fails(capsys, *argv)
  assert not (tmp_path / "classifier.json").exists()


def test_flips_follow_the_config(data, tmp_path, monkeypatch, capsys):
  def batches(*_, flip):
    raise errors.UserError(f"flip={flip}")

  monkeypatch.setattr(train_classifier.pipeline, "Batches", batches)
  assert "flip=False" in fails(capsys, *arguments(data, tmp_path))
  flipped = arguments(data, tmp_path, "--config.data.flip=True")
  assert "flip=True" in fails(capsys, *flipped)


@pytest.mark.parametrize(
    ("shape", "margin"),
    [((8, 8, 1), 1), ((16, 20, 3), 2), ((32, 32, 3), 4), ((64, 64, 3), 4)],
)
def test_margin_of_crops(shape, margin):
  assert train_classifier.crop_margin(shape) == margin


def test_crops_are_windows_of_the_reflected_image_each_as_often():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (6, 5, 2), dtype=np.uint8)
  padded = np.pad(image, [(1, 1), (1, 1), (0, 0)], mode="reflect")
  windows = [
      padded[i : i + 6, j : j + 5] for i in range(3) for j in range(3)
  ]
  keys = jax.random.split(jax.random.key(0), 900)
  crop = jax.vmap(lambda key: train_classifier.random_crop(key, image, 1))
  crops = np.asarray(quick.jit(crop)(keys))
  assert crops.dtype == np.uint8
  equal = np.stack([(crops == w).all(axis=(1, 2, 3)) for w in windows])
  np.testing.assert_array_equal(equal.sum(axis=0), 1)
  # 100 expected of each; six standard deviations of the binomial.
  assert np.abs(equal.sum(axis=1) - 100).max() < 6 * 9.5


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(1437, 128, 562), (50_000, 128, 4500), (10, 10, 50)],
)
def test_small_sets_take_fewer_steps(images, batch, steps):
  settings = train_classifier.Settings(batch_size=batch)
  assert settings.for_images(images).steps == steps
  asked = train_classifier.Settings(steps=7, batch_size=batch)
  assert asked.for_images(images).steps == 7


class Linear:
  """A network of one dense layer, to check a step by hand."""

  num_classes = 3

  def apply(self, variables, images):
    x = images.reshape(len(images), -1)
    return x, x @ variables["params"]


def test_a_steps_loss_is_the_smoothed_cross_entropy():
  rng = np.random.default_rng(0)
  # Flat images: no crop changes them.
  images = np.repeat(rng.integers(0, 9, (4, 1)), 64, axis=1).astype(np.uint8)
  params = rng.normal(size=(64, 3)).astype(np.float32)
  labels = np.array([0, 2, 1, 1], np.int32)
  settings = train_classifier.Settings(steps=10, label_smoothing=0.3)
  step_fn = quick.jit(train_classifier.make_step(Linear(), settings, 1))
  opt_state = settings.optimizer().init(params)
  batch = dict(
      image=images.reshape(4, 8, 8, 1), label=labels, index=jnp.arange(4)
  )
  _, _, loss = step_fn(params, opt_state, 0, batch)
  logits = images.astype(np.float64) @ params
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  targets = 0.7 * np.eye(3)[labels] + 0.1
  assert loss == pytest.approx(-(targets * log_p).sum(1).mean(), rel=1e-5)
