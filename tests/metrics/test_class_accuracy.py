"""Class accuracy on the real handwritten digits."""

import numpy as np
import pytest
import sklearn.datasets
import sklearn.model_selection
import sklearn.svm

from bcm_jax.errors import UserError
from bcm_jax.metrics import class_accuracy


@pytest.fixture(scope="module")
def digits():
  """(train, test) of (pixels in 0..16, uint8 images, labels)."""
  pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
  images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  train, test = sklearn.model_selection.train_test_split(
    np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
  )
  return [(pixels[i], images[i], labels[i]) for i in (train, test)]


@pytest.fixture(scope="module")
def classifier(digits):
  _, images, labels = digits[0]
  return class_accuracy.DigitsSVC().fit(images, labels)


def test_agrees_with_scikit_learn_on_the_test_digits(classifier, digits):
  (train_pixels, _, train_labels), (pixels, images, labels) = digits
  plain = sklearn.svm.SVC(gamma=0.256).fit(train_pixels / 16, train_labels)
  found = classifier.predict(images)
  assert np.sum(found == labels) >= 355  # of 360; 356 with scikit-learn 1.9
  assert np.sum(found != plain.predict(pixels / 16)) <= 1


def test_accuracy_with_right_and_with_wrong_labels(classifier, digits):
  _, images, labels = digits[1]
  real = class_accuracy.class_accuracy(classifier.predict(images), labels)
  assert real["accuracy"] >= 355 / 360
  assert sorted(real["per_class"]) == list(range(10))
  wrong = class_accuracy.class_accuracy(
    classifier.predict(images), (labels + 1) % 10
  )
  assert wrong["accuracy"] <= 5 / 360


def test_gamma_changes_the_classifier(digits):
  _, images, labels = digits[0]
  blind = class_accuracy.PixelSVC(gamma=1e4).fit(images[:300], labels[:300])
  _, images, labels = digits[1]
  assert np.mean(blind.predict(images) == labels) < 0.5


def test_accuracy_per_requested_class():
  found = class_accuracy.class_accuracy(
    np.array([3, 3, 7, 3, 5, 5]), np.array([3, 3, 7, 7, 5, 3])
  )
  assert found == {
    "accuracy": 4 / 6,
    "worst_class_accuracy": 0.5,
    "worst_class": 7,
    "per_class": {3: 2 / 3, 5: 1.0, 7: 0.5},
  }


def test_bad_input_is_a_user_error(classifier):
  images = np.zeros((4, 8, 8, 1), np.uint8)
  with pytest.raises(UserError, match="expected uint8"):
    classifier.predict(images / 255.0)
  with pytest.raises(UserError, match="expected 64"):
    classifier.predict(np.zeros((4, 8, 8, 3), np.uint8))
  with pytest.raises(UserError, match="labels"):
    class_accuracy.class_accuracy(np.arange(4), np.arange(3))
  with pytest.raises(UserError, match="labels"):
    class_accuracy.DigitsSVC().fit(images, np.arange(5))
  with pytest.raises(UserError, match="one class only"):
    class_accuracy.DigitsSVC().fit(images, np.zeros(4, int))
  with pytest.raises(UserError, match="expected uint8"):
    classifier.predict(images[:0])
