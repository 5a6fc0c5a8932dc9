"""Results and images of several settings, of files, and of stopped runs."""

import json
import os
import pickle

import numpy as np
import PIL.Image
import pytest

from bcm_jax import errors
from bcm_jax import sample
from bcm_jax.checkpoint import runs
from bcm_jax.data import image_source
from bcm_jax.evaluation import evaluate
from bcm_jax.evaluation import references
from bcm_jax.metrics import moments
from bcm_jax.metrics import quality
from bcm_jax.metrics import reference_stats
from tests import exact

FEW = {
    "eval.num_samples": "20", "eval.allow_fewer_samples": "true",
    "eval.num_real_for_prdc": "30", "eval.samplers": "onestep,",
    "eval.inversion_nfe": "1,", "invert.num_images": "4",
    "sample.num_samples": "12",
}
DISTANCE = "FD (raw pixels)"


def experiment(**overrides):
  values = {k.replace("__", "."): str(v) for k, v in overrides.items()}
  return exact.experiment(overrides=FEW | values)


@pytest.fixture(autouse=True)
def no_checkpoint(monkeypatch):
  monkeypatch.setattr(runs, "load_run", lambda *args: (4, "params", {}))


@pytest.fixture
def quick(monkeypatch):
  """Without the metrics of small data sets."""
  monkeypatch.setattr(
      evaluate.Evaluation, "_open_small_dataset", lambda self: None
  )


def results(folder):
  paths = (folder / "eval").glob("*.json")
  return {p.stem: json.loads(p.read_text()) for p in paths}


@pytest.mark.parametrize("other", [
    {"eval__seeds": "1,"}, *(pytest.param(p, marks=pytest.mark.slow) for p in (
        {"eval__samplers": "ancestral@3,"}, {"sample__times": "2.5,"},
        {"eval__num_real_for_prdc": 40}, {"invert__noise": 0.3},
    )),
])
@pytest.mark.usefixtures("quick")
def test_results_of_other_settings_are_kept(tmp_path, other):
  evaluate.run(experiment(), str(tmp_path))
  first = results(tmp_path)["4"]
  evaluate.run(experiment(**other), str(tmp_path))
  found = results(tmp_path)
  assert len(found) == 2 and found.pop("4") != first
  assert list(found.values()) == [first]
  # The first settings again: two results, no third.
  evaluate.run(experiment(log__every_steps=7), str(tmp_path))
  again = results(tmp_path)
  assert len(again) == 2 and again["4"]["samplers"] == first["samplers"]
  assert not list((tmp_path / "eval").glob("*.partial"))


@pytest.mark.usefixtures("quick")
def test_a_stopped_evaluation_goes_on_with_the_next_seed(tmp_path, monkeypatch):
  asked = experiment(eval__seeds="1,2,3", eval__samplers="onestep,ancestral@3")
  whole = evaluate.run(asked, str(tmp_path / "whole"))[0]
  measure, calls = quality.sample_quality, []

  def stop_in_the_fifth(*args):
    calls.append(args)
    if len(calls) == 5:
      raise KeyboardInterrupt
    return measure(*args)

  monkeypatch.setattr(quality, "sample_quality", stop_in_the_fifth)
  with pytest.raises(KeyboardInterrupt):
    evaluate.run(asked, str(tmp_path))
  assert not results(tmp_path)
  resumed = evaluate.run(asked, str(tmp_path))[0]
  assert len(calls) == 5 + 2  # Four of six were known.
  for part in ("samplers", "inversion"):
    assert resumed[part] == whole[part]
  # What was measured for other settings is not used.
  (tmp_path / "eval" / "4.json").unlink()
  evaluate.run(experiment(eval__seeds="1,2"), str(tmp_path))
  assert len(calls) == 5 + 2 + 2


@pytest.mark.usefixtures("quick")
def test_a_damaged_record_of_a_stopped_evaluation(tmp_path):
  evaluation = evaluate.Evaluation(experiment(), str(tmp_path))
  name = f"4_{evaluate._settings_digest(evaluation, 'params')}.partial"
  (tmp_path / "eval" / name).write_text('{"inv')
  with pytest.raises(errors.UserError, match="partial"):
    evaluate.run(experiment(), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("mode, folder, keys", [
    ("sample", "samples/onestep_nfe1", (
        {}, {"sample__seed": 1}, {"sample__num_samples": 13},
        {"sample__label": 3},
    )),
    ("sample", "samples/ancestral_nfe2", (
        {"sample__sampler": "ancestral", "sample__times": "3,"},
        {"sample__sampler": "ancestral", "sample__times": "2,"},
    )),
    ("invert", "inversions/nfe1", (
        {"invert__nfe": 1}, {"invert__nfe": 1, "invert__noise": 0.3},
        {"invert__nfe": 1, "invert__num_images": 5},
    )),
    ("edit", "edits/denoise", (
        {"edit__task": "denoise", "edit__num_images": 2},
        {"edit__task": "denoise", "edit__num_images": 3},
        {"edit__task": "denoise", "edit__sigma": 0.7, "edit__num_images": 3},
    )),
])
def test_images_of_other_settings_are_kept(tmp_path, mode, folder, keys):
  arrays = []
  for overrides in keys:
    (written,) = sample.run(experiment(**overrides), str(tmp_path), mode)
    assert written == str(tmp_path / folder)
    (path,) = [p for p in os.listdir(written) if p.endswith(".npz")]
    with np.load(f"{written}/{path}") as file:
      arrays.append({k: file[k] for k in file})
  sample.run(experiment(**keys[-1]), str(tmp_path), mode)
  kept = sorted((tmp_path / folder).parent.glob(f"*/{path}"))
  assert len(kept) == len(keys)
  for expected in arrays:
    assert any(
        all(np.array_equal(np.load(p)[k], v) for k, v in expected.items())
        for p in kept
    )


@pytest.mark.slow
def test_png_files_and_npz_are_evaluated_like_the_network(tmp_path):
  asked = experiment(sample__num_samples=20, sample__png="true")
  (folder,) = sample.run(asked, str(tmp_path), "sample")
  assert len(os.listdir(f"{folder}/png")) == 20
  network = evaluate.run(experiment(), str(tmp_path))[0]
  expected = network["samplers"]["onestep_nfe1"]
  for name, labels in (("samples.npz", True), ("png", False)):
    path = f"{folder}/{name}"
    (result,) = evaluate.run(experiment(eval__samples=path), str(tmp_path))
    (numbers,) = result["samplers"].values()
    assert numbers[DISTANCE] == pytest.approx(expected[DISTANCE], rel=1e-9)
    assert numbers["recall"] == expected["recall"]
    assert ("class_accuracy" in numbers) == labels
    assert result["protocol"]["samples"] == 20
    assert "few_samples" in result["protocol"]
  found = results(tmp_path)
  assert set(found) == {"4", "samples_samples.npz", "samples_png"}


def write_samples(path):
  """Writes files that are no 20 images of 8x8 pixels in one channel."""
  good = np.zeros((20, 8, 8, 1), np.uint8)
  np.savez(path / "fewer.npz", arr_0=good[:7])
  np.savez(path / "more.npz", arr_0=np.repeat(good, 2, 0))
  np.savez(path / "floats.npz", arr_0=good / 255)
  np.savez(path / "rgb.npz", arr_0=np.repeat(good, 3, 3))
  np.savez(path / "large.npz", arr_0=np.zeros((20, 9, 9, 1), np.uint8))
  np.savez(path / "labels.npz", arr_0=good, arr_1=np.full(20, 10))
  np.savez(path / "names.npz", arr_0=good, arr_1=np.full(20, "a"))
  np.savez(path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
  np.savez(path / "none.npz", arr_0=good[:0])
  (path / "empty").mkdir()
  (path / "broken").mkdir()
  (path / "broken" / "a.png").write_bytes(b"no image")
  (path / "sizes").mkdir()
  for size in (8, 9):
    PIL.Image.new("L", (size, size)).save(path / "sizes" / f"{size}.png")
  (path / "text.txt").write_text("x")


@pytest.mark.parametrize("name", [
    "fewer.npz", "more.npz", "floats.npz", "rgb.npz", "large.npz", "labels.npz",
    "names.npz", "statistics.npz", "none.npz", "empty", "broken", "sizes",
    "text.txt", "gone.npz",
])
@pytest.mark.usefixtures("quick")
def test_files_that_are_no_samples(tmp_path, name):
  write_samples(tmp_path)
  asked = experiment(
      eval__samples=str(tmp_path / name),
      eval__allow_fewer_samples=name != "fewer.npz",
      eval__num_samples=50_000 if name == "fewer.npz" else 20,
  )
  with pytest.raises(errors.UserError, match=name.partition(".")[0]) as caught:
    evaluate.run(asked, str(tmp_path))
  assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quick")
def test_wrong_references_are_refused_before_sampling(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate.Evaluation, "_draw", None)
  images = np.zeros((9, 8, 8, 1), np.uint8)
  mean, covariance = np.zeros(64), np.eye(64)
  for name, arrays in {
      "inception": {"mu": np.zeros(2048), "sigma": np.eye(2048)},
      "one": {"mu": np.zeros(1), "sigma": np.eye(1)},
      "rgb": {"mu": np.zeros(192), "sigma": np.eye(192)},
      "images": {"arr_0": np.zeros((9, 9, 9, 1), np.uint8)},
      "adm": {"arr_0": np.repeat(images, 3, 3), "mu": mean,
              "sigma": covariance},
      "jcm": {"pool_3": np.zeros((9, 64))},
      "nan": {"mu": mean * np.nan, "sigma": covariance},
      "half": {"mu": mean},
      "askew": {"mu": mean, "sigma": covariance + np.tri(64)},
      "below": {"mu": mean, "sigma": -covariance},
      "flat": {"mu": mean, "sigma": mean},
      "ints": {"mu": mean.astype(int), "sigma": covariance.astype(int)},
  }.items():
    path = tmp_path / f"{name}.npz"
    np.savez(path, **arrays)
    asked = experiment(eval__reference=str(path))
    with pytest.raises(errors.UserError, match=f"reference|{name}"):
      evaluate.check_before_training(asked)
    with pytest.raises(errors.UserError, match=f"reference|{name}"):
      evaluate.run(asked, str(tmp_path))


@pytest.mark.parametrize("content", ["fid", "flat", "float32"])
def test_edm2_pickles_are_references(tmp_path, content):
  rng = np.random.default_rng(0)
  mean, covariance = rng.normal(size=64), np.eye(64)
  stats = {"mu": mean, "sigma": covariance}
  if content == "float32":
    stats = {k: v.astype(np.float32) for k, v in stats.items()}
  content = stats if content == "flat" else {
      "fd_dinov2": {"mu": np.zeros(9), "sigma": np.eye(9)}, "fid": stats,
  }
  path = tmp_path / "img512.pkl"
  path.write_bytes(pickle.dumps(content))
  found = reference_stats.load_reference(path).pooled
  np.testing.assert_array_equal(found.mean, stats["mu"])
  np.testing.assert_array_equal(found.covariance, covariance)
  evaluate.check_before_training(experiment(eval__reference=str(path)))


class Bomb:
  """Runs a command when a plain unpickler reads it."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def test_hostile_and_other_pickles_are_refused(tmp_path):
  contents = {
      "bomb": Bomb(tmp_path / "ran"), "nested": {"fid": Bomb(tmp_path / "ran")},
      "list": [1, 2], "number": 3, "half": {"fid": {"mu": np.zeros(3)}},
      "text": {"fid": "mu"}, "shapes": {"mu": np.zeros(3), "sigma": np.eye(4)},
      "lists": {"mu": [0.0], "sigma": [[1.0]]},
      "objects": {"mu": np.array([None]), "sigma": np.eye(1)},
      "nan": {"mu": np.array([np.nan]), "sigma": np.eye(1)}, "none": None,
  }
  blobs = {k: pickle.dumps(v) for k, v in contents.items()}
  blobs |= {"cut": blobs["shapes"][:40], "nothing": b"", "noise": b"\x80\x04x"}
  for name, blob in blobs.items():
    path = tmp_path / f"{name}.pkl"
    path.write_bytes(blob)
    with pytest.raises(errors.UserError) as caught:
      reference_stats.load_reference(path)
    assert "\n" not in str(caught.value)
  assert not (tmp_path / "ran").exists()
  with pytest.raises(errors.UserError, match="gone.pkl"):
    reference_stats.load_reference(tmp_path / "gone.pkl")


def test_digests_of_references_do_not_depend_on_rounding(tmp_path):
  built = experiment()
  features = references.open_features(built.eval)
  source = built.source("train")
  reference = references.compute(source, features)
  mean, covariance = reference.pooled
  other = reference_stats.Reference(**vars(reference) | {
      "pooled": moments.Gaussian(np.nextafter(mean, 9), covariance)
  })
  assert other.digest() == reference.digest()
  # Other images, classes of features, or files of other programs differ.
  images = source.fetch(np.arange(500))["image"]
  fewer = references.compute(
      image_source.ArraySource(images, name=source.name), features
  )
  assert fewer.digest() != reference.digest()
  reference_stats.save_reference(tmp_path / "r.npz", other)
  assert reference_stats.load_reference(tmp_path / "r.npz").digest() == (
      reference.digest()
  )
  with np.load(tmp_path / "r.npz") as file:
    np.savez(tmp_path / "edm.npz", mu=file["mu"], sigma=file["sigma"])
  bare = reference_stats.load_reference(tmp_path / "edm.npz")
  assert bare.digest() not in (reference.digest(), fewer.digest())


@pytest.mark.parametrize("keys", [
    {"eval__num_samples": 5}, {"eval__k": 20}, {"eval__num_real_for_prdc": 5},
    {"eval__num_real_for_prdc": 3, "eval__k": 3},
])
def test_fewer_images_than_neighbors_are_refused_before_sampling(keys):
  with pytest.raises(errors.UserError, match="eval.k"):
    evaluate.check_before_training(experiment(**keys))
