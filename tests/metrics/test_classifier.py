"""Classifiers as features: names, digests, files, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bcm_jax.errors import UserError
from bcm_jax.metrics import classifier
from bcm_jax.models import resnet
from tests import quick

SHAPE = (9, 8, 3)


def make(seed=0, name="stripes ResNet", shape=SHAPE, params=None, **changes):
  """A classifier, of random weights where none are given."""
  network = resnet.ResNet(**dict(num_classes=4, widths=(8, 16)) | changes)
  if params is None:
    variables = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape)))
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32),
        variables["params"],
    )
  return classifier.Classifier(name, network, params, shape)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (70, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(images):
  """(parameters, features, logits) of a network that sees several classes."""
  made = make()
  features, logits = quick.jit(
      lambda x: made.network.apply({"params": made.params}, x)
  )(images.astype(np.float32))
  # Random weights put one class above all others; that is taken off.
  excess = np.mean(logits, axis=0)
  params = jax.tree.map(np.copy, made.params)
  params["logits"]["bias"] -= excess
  return params, np.asarray(features), np.asarray(logits) - excess


@pytest.fixture(scope="module")
def made(expected):
  return make(params=expected[0])


@pytest.fixture
def folder(made, tmp_path):
  classifier.save_classifier(tmp_path, made, {"test_accuracy": 0.5})
  return tmp_path


@pytest.mark.slow
def test_activations_are_those_of_the_network(made, images, expected):
  _, features, logits = expected
  found = made(images)
  np.testing.assert_allclose(found.pooled, features, rtol=1e-4, atol=1e-4)
  assert found.spatial is None
  likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(found.probabilities, likely, rtol=1e-3, atol=1e-6)
  classes = made.classify(images)
  np.testing.assert_array_equal(classes, np.argmax(logits, axis=1))
  assert len(np.unique(classes)) > 2


def test_name_and_distance(made):
  assert made.name == "stripes ResNet"
  assert made.distance == "FD (stripes ResNet)"


def test_digest_tells_weights_network_and_images_apart_but_not_names(made):
  assert len(made.digest) == 12
  assert make(name="other").digest == make().digest
  others = [make(), make(seed=1), make(stem_stride=2), make(shape=(8, 8, 3))]
  digests = {made.digest, *(other.digest for other in others)}
  assert len(digests) == 5


def test_comes_back_as_it_was_written(folder, made, images):
  found = classifier.load_classifier(str(folder))
  assert (found.name, found.digest) == (made.name, made.digest)
  assert found.distance == made.distance
  assert found.image_shape == made.image_shape
  for a, b in zip(found(images)[::2], made(images)[::2], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  facts = json.loads((folder / "classifier.json").read_text())
  assert facts["test_accuracy"] == 0.5
  assert sorted(p.name for p in folder.iterdir()) == [
      "classifier.json", "classifier.safetensors"
  ]


def test_an_interrupted_write_leaves_no_classifier(folder, monkeypatch):
  def fails(*_):
    raise OSError("no space left")

  monkeypatch.setattr(classifier.weight_files, "write", fails)
  with pytest.raises(OSError, match="no space"):
    classifier.save_classifier(folder, make(seed=1), {})
  with pytest.raises(UserError, match="has no classifier"):
    classifier.load_classifier(str(folder))


def test_a_folder_without_classifier(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
    with pytest.raises(UserError, match="has no classifier .*train_class"):
      classifier.load_classifier(str(path))


def change(folder, **changes):
  path = folder / "classifier.json"
  facts = json.loads(path.read_text()) | changes
  facts = {k: v for k, v in facts.items() if v is not None}
  path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(digest="0123456789ab"), "not 0123456789ab"),
        (dict(image_shape=[8, 8, 3]), "digest"),
        (dict(network=dict(num_classes=4, widths=[8, 24])), "digest"),
        (dict(network=dict(num_classes=4, widths=[8, 16], deep=1)), "deep"),
        (dict(network=dict(num_classes=4)), "KeyError: 'widths'"),
        (dict(network=7), "TypeError"),
        (dict(name=None), "KeyError: 'name'"),
    ],
)
def test_changed_facts_are_noticed(folder, changes, words):
  change(folder, **changes)
  with pytest.raises(UserError, match=f"is corrupt .*{words}.*restore"):
    classifier.load_classifier(str(folder))


def test_cut_facts_are_noticed(folder):
  path = folder / "classifier.json"
  path.write_text(path.read_text()[:-20])
  with pytest.raises(UserError, match="is corrupt .*JSONDecodeError"):
    classifier.load_classifier(str(folder))


def test_changed_weights_are_noticed(folder):
  path = folder / "classifier.safetensors"
  content = path.read_bytes()
  # One bit of the last weight.
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(UserError, match="is corrupt .*weights of digest"):
    classifier.load_classifier(str(folder))
  path.write_bytes(content[:-1])
  with pytest.raises(UserError, match="classifier.safetensors.*whole"):
    classifier.load_classifier(str(folder))
  path.unlink()
  with pytest.raises(UserError, match="classifier.safetensors.*cannot be read"):
    classifier.load_classifier(str(folder))


def test_weights_of_another_network_are_noticed(folder):
  tensors = safetensors.numpy.load_file(folder / "classifier.safetensors")
  assert tensors.pop("stage1_block0.conv1.bias").shape == (16,)
  safetensors.numpy.save_file(tensors, folder / "classifier.safetensors")
  with pytest.raises(UserError, match="is corrupt"):
    classifier.load_classifier(str(folder))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(8, 8, 3\), expected \(9, 8, 3"),
        (np.zeros((2, 9, 8, 1), np.uint8), r"got images of shape \(9, 8, 1\)"),
        (np.zeros((2, *SHAPE)), "expected uint8"),
        (np.zeros(SHAPE, np.uint8), "expected uint8"),
        (np.zeros((0, *SHAPE), np.uint8), "n >= 1"),
    ],
)
def test_other_images_are_refused(made, bad, words):
  with pytest.raises(UserError, match=words):
    made(bad)
  with pytest.raises(UserError, match=words):
    made.classify(bad)
