"""Rejection by a classifier keeps the best of every class."""

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.generate import rejection


@pytest.mark.parametrize("drawn, count", [(60, 40), (61, 43), (30, 30)])
def test_the_best_of_every_class_in_their_order(drawn, count):
  labels = np.arange(drawn) % 10
  scores = np.random.default_rng(0).random(drawn)
  kept = rejection.best(scores, labels, count)
  assert len(set(kept)) == count and np.all(np.diff(kept) > 0)
  np.testing.assert_array_equal(
      np.bincount(labels[kept], minlength=10),
      np.bincount(np.arange(count) % 10, minlength=10),
  )
  left = np.setdiff1d(np.arange(drawn), kept)
  for label in range(10):
    worst = scores[kept[labels[kept] == label]].min()
    assert np.all(scores[left[labels[left] == label]] <= worst)


@pytest.mark.parametrize("overrides, said", [
    ({"sample.rejection": "-1.0"}, "sample.rejection"),
    ({"sample.rejection": "0.5"}, "sample.rejection_classifier"),
    ({"sample.rejection": "0.5", "sample.label": "3"}, "sample.label"),
    ({"sample.rejection": "0.5", "model.num_classes": "none"},
     "sample.rejection"),
    ({"sample.rejection": "0.5", "sample.rejection_classifier": "/nowhere"},
     "/nowhere"),
])
def test_what_cannot_be_done(overrides, said):
  file = resolve.read_file("configs/digits.py")
  with pytest.raises(errors.UserError, match=said):
    rejection.check(build.build(resolve.resolve(file, overrides)))
