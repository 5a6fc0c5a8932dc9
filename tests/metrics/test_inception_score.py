"""Inception scores: closed forms and the definition."""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import inception_score as score_lib


def softmax(seed, count=900, classes=7, dtype=np.float64):
  logits = 3 * np.random.default_rng(seed).normal(size=(count, classes))
  p = np.exp(logits)
  return (p / p.sum(axis=1, keepdims=True)).astype(dtype)


def definition(p):
  marginal = p.mean(axis=0)
  return np.exp(np.mean([np.sum(q * np.log(q / marginal)) for q in p]))


def test_uniform_predictions_score_one():
  found = score_lib.inception_score(np.full((100, 8), 1 / 8), 30)
  assert found == pytest.approx((1.0, 0.0), abs=1e-14)


def test_certain_and_balanced_predictions_score_the_number_of_classes():
  certain = np.tile(np.eye(10), (50, 1))
  assert score_lib.inception_score(certain, 100) == pytest.approx((10.0, 0.0))
  # One class only is certain and not diverse.
  alone = np.repeat(np.eye(10)[:1], 50, axis=0)
  assert score_lib.inception_score(alone) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize(
  "dtype, rtol", [(np.float64, 1e-12), (np.float32, 1e-5)]
)
def test_is_the_definition_on_splits_in_file_order(dtype, rtol):
  p = softmax(0, dtype=dtype)
  # 900 = 400 + 400 + 100: what is left over is a split of its own.
  scores = [definition(part.astype(np.float64))
            for part in (p[:400], p[400:800], p[800:])]
  mean, deviation = score_lib.inception_score(p, 400)
  assert mean == pytest.approx(np.mean(scores), rel=rtol)
  assert deviation == pytest.approx(np.std(scores), rel=1e-3)
  assert 1.0 < mean < 7.0


def test_splits_are_5000():
  p = softmax(1, 6000)
  whole = score_lib.inception_score(p)
  expected = np.mean([definition(p[:5000]), definition(p[5000:])])
  assert whole.mean == pytest.approx(expected, rel=1e-12)


def test_bad_input_is_a_user_error():
  p = softmax(2, 20)
  p[4] *= 1.1
  with pytest.raises(UserError, match="row 4 .* not logits"):
    score_lib.inception_score(p)
  p[4] /= 1.1
  p[6] = [-0.5, 1.5, 0, 0, 0, 0, 0]
  with pytest.raises(UserError, match="row 6 .* minimum -0.5"):
    score_lib.inception_score(p)
  p[2, 1] = np.nan
  with pytest.raises(UserError, match="row 2 "):
    score_lib.inception_score(p)
  with pytest.raises(UserError, match="probabilities: got shape"):
    score_lib.inception_score(p[0])
  with pytest.raises(UserError, match="split_size: got 0"):
    score_lib.inception_score(softmax(3), 0)
