"""Steps that are not finite are judged late, but all of them, and told."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.training import nonfinite

ROW = dict(step=1, data_offset=0, position=2, reached=1, count=1)


def metrics(*in_row):
  """Of a call of one step, or of several."""
  row = in_row[0] if len(in_row) == 1 else np.array(in_row)
  return {"skipped_in_row": jnp.asarray(row), "loss": jnp.asarray(row) * 0.5}


def test_good_steps_pass():
  judge = nonfinite.Guard(2)
  for step in range(1, 20):
    judge.check(step, metrics(step % 2), wait=step == 19)


class Unread:
  """A metric that is still being computed."""

  def __array__(self, *args, **kwargs):
    raise AssertionError("waited for the device")


def test_the_device_is_not_waited_for():
  judge = nonfinite.Guard(2)
  judge.check(1, metrics(0))
  judge.check(2, {"skipped_in_row": Unread()})
  judge.check(3, {"skipped_in_row": Unread()})
  with pytest.raises(AssertionError, match="waited"):
    judge.check(3, {"skipped_in_row": Unread()}, wait=True)


def test_too_many_in_a_row_are_told_two_calls_later():
  judge = nonfinite.Guard(3)
  for step, in_row in enumerate((0, 1, 2, 3, 4), start=1):
    judge.check(step, metrics(in_row))
  with pytest.raises(nonfinite.NotFinite) as error:
    judge.check(6, metrics(5))
  assert error.value.step == 4  # The first that was too many.
  assert error.value.metrics == {"skipped_in_row": 3.0, "loss": 1.5}
  assert str(error.value).startswith(
      "step 4: 3 steps in a row were not finite (loss=1.5"
  )


def test_what_is_saved_is_judged_before():
  judge = nonfinite.Guard(2)
  judge.check(1, metrics(1))
  with pytest.raises(nonfinite.NotFinite) as error:
    judge.check(2, metrics(2), wait=True)
  assert error.value.step == 2


def test_the_last_step_of_a_run_must_be_finite():
  judge = nonfinite.Guard(20)
  judge.check(8, metrics(0, 1, 2, 3), wait=True)
  judge.check(12, metrics(0, 1, 2, 0), wait=True, last=True)
  with pytest.raises(nonfinite.NotFinite) as error:
    judge.check(16, metrics(0, 0, 0, 1), wait=True, last=True)
  assert error.value.step == 16


def test_the_step_is_found_in_a_call_of_several():
  judge = nonfinite.Guard(2)
  judge.check(4, metrics(0, 0, 0, 1))
  with pytest.raises(nonfinite.NotFinite) as error:
    judge.check(8, metrics(2, 3, 0, 0), wait=True)
  assert error.value.step == 5 and error.value.metrics["loss"] == 1.0
  # Steps that were good again later are no excuse.
  with pytest.raises(nonfinite.NotFinite) as error:
    nonfinite.Guard(2).check(8, metrics(0, 1, 2, 0), wait=True)
  assert error.value.step == 7


def test_the_bundle_tells_where_it_is_not_finite(tmp_path):
  state = {
      "w": np.array([[3.0, np.nan], [np.inf, 4.0]], np.float32),
      "half": jnp.ones(4, jnp.bfloat16), "none": None,
      "empty": np.zeros((0, 3), np.float32),
  }
  error = nonfinite.NotFinite(7, 2, {"loss": float("nan"), "grad_norm": 2.0})
  folder = nonfinite.write_bundle(
      str(tmp_path), error, state, {"image": np.full((2, 1), np.nan)},
      {"rollbacks": 3},
  )
  assert folder == str(tmp_path / "diagnostics" / "step-7")
  with open(f"{folder}/report.json", encoding="utf-8") as file:
    report = json.load(file)
  assert report["step"] == 7 and report["rollbacks"] == 3
  assert report["metrics"] == {"loss": "nan", "grad_norm": "2.0"}
  assert report["tensors"]["w"] == {
      "norm": 5.0, "largest": 4.0, "not_finite": 2
  }
  assert report["tensors"]["half"]["norm"] == 2.0
  assert report["tensors"]["empty"]["not_finite"] == 0
  with np.load(f"{folder}/batch.npz") as batch:
    assert np.isnan(batch["image"]).all()


@pytest.mark.parametrize("text", [
    "", "{", '{"a": 1}', '[{"a": 1}]', "null", "3", "[3]", "[[1,2,3,4,5]]",
    "[" * 100_000, "[" + str(ROW).replace("'", '"').replace("1", "1e30") + "]",
    "[" + str(ROW).replace("'", '"').replace("1", "-1") + "]",
])
def test_damaged_rollbacks_are_refused(tmp_path, text):
  path = tmp_path / nonfinite.ROLLBACKS
  path.write_text(text)
  with pytest.raises(errors.UserError, match=nonfinite.ROLLBACKS):
    nonfinite.rollback_history(str(tmp_path))
  with pytest.raises(errors.UserError, match=nonfinite.ROLLBACKS):
    nonfinite.add_rollback(str(tmp_path), nonfinite.Rollback(**ROW))
  assert path.read_text() == text


def test_rollbacks_are_read_back(tmp_path):
  row = nonfinite.Rollback(**ROW)
  assert nonfinite.rollback_history(str(tmp_path)) == []
  nonfinite.add_rollback(str(tmp_path), row)
  nonfinite.add_rollback(str(tmp_path), row)
  assert nonfinite.rollback_history(str(tmp_path)) == [row, row]
