"""Parameters out of a run's checkpoints: averages of any length."""

import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax import train
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import resolve
from bcm_jax.methods import base
from bcm_jax.training import phema
from bcm_jax.training import train_state

STDS = (0.05, 0.1)


def experiment(stds=STDS, average=None, heads=()):
  config = ml_collections.ConfigDict(
      {"training": {"ema_stds": stds}, "sample": {"average": average}}
  )
  method = types.SimpleNamespace(
      sampled_network="student",
      networks={
          "student": base.TrainableNetwork(None, None, heads=heads)
      },
  )
  return types.SimpleNamespace(
      config=config, method=method, check_config=lambda *args: None,
      check_params=lambda *args: None,
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(work directory of a run whose parameter is sqrt(k) at step k, averages).
  """
  folder = tmp_path_factory.mktemp("run")
  tracked = {std: jnp.zeros(()) for std in (*STDS, 0.15)}
  with checkpoint.Checkpoints(runs.checkpoint_dir(str(folder)), None) as saved:
    for step in range(1, 81):
      value = jnp.sqrt(jnp.float32(step))
      for std in tracked:
        tracked[std] = phema.update(tracked[std], value, std, step, 1)
      if step % 10 == 0:
        saved.save(step, {
            "networks": {"student": {"params": {"w": value}}},
            "averages": {
                train_state.phema_name(s): {"w": tracked[s]} for s in STDS
            },
        }, {})
  return str(folder), tracked


def test_first_average_or_the_one_asked_for(run):
  folder, tracked = run
  step, _, params = runs.load_run(experiment(), folder)
  assert step == 80 and params["w"] == tracked[0.05]
  _, _, params = runs.load_run(experiment(), folder, "phema_0.1")
  assert params["w"] == tracked[0.1]
  _, _, params = runs.load_run(experiment(average="params"), folder)
  assert params["w"] == jnp.sqrt(80.0)


def test_posthoc_average_is_the_one_that_was_not_tracked(run):
  folder, tracked = run
  _, _, params = runs.load_run(experiment(), folder, "posthoc_0.15")
  wanted = float(tracked[0.15])
  assert float(params["w"]) == pytest.approx(wanted, rel=2e-3)
  # The nearest tracked one is much farther away.
  assert abs(float(tracked[0.1]) - wanted) > 0.02 * wanted
  # A length that was tracked comes out as it was.
  _, _, params = runs.load_run(experiment(), folder, "posthoc_0.1")
  assert float(params["w"]) == pytest.approx(float(tracked[0.1]), rel=1e-5)


@pytest.mark.parametrize("stds, average, match", [
    ((), "posthoc_0.15", "training.ema_stds"),
    (STDS, "posthoc_x", "posthoc_0.15"),
    (STDS, "posthoc_0.4", "sigma_rel: got 0.4"),
    (STDS, "phema_0.2", "phema_0.2.*phema_0.05"),
])
def test_averages_that_are_not_there(run, stds, average, match):
  with pytest.raises(errors.UserError, match=match):
    runs.load_run(experiment(stds), run[0], average)


def test_missing_images_stop_before_anything_is_written(tmp_path):
  config = resolve.resolve({
      "data": {"name": "none", "image_shape": (8, 8, 3)},
      "model": {"name": "ddpmpp"}, "method": {"name": "ict"},
      "eval": {"samplers": ("onestep",)},
  })
  with pytest.raises(errors.UserError, match="data.name"):
    train.train_and_evaluate(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_heads_of_the_losses_are_not_loaded(run):
  folder, _ = run
  _, _, params = runs.load_run(experiment(heads=("w",)), str(folder), "params")
  assert params == {}
  assert set(runs.load_params(str(folder), "params")) == {"w"}


def test_parameters_of_a_step(run, tmp_path):
  """training.init_from takes DIR and DIR@STEP."""
  folder, _ = run
  for place, step in ((folder, 80), (f"{folder}@80", 80), (f"{folder}@30", 30)):
    params = runs.load_params(place, "params")
    np.testing.assert_allclose(params["w"], np.sqrt(step), rtol=1e-6)
  with pytest.raises(errors.UserError, match="35"):
    runs.load_params(f"{folder}@35", None)
  for wrong in ("x", "", "-1", "3.5"):
    with pytest.raises(errors.UserError, match=r"training\.init_from"):
      runs.load_params(f"{folder}@{wrong}", None)


def test_a_folder_with_an_at_sign_is_no_step(tmp_path):
  (tmp_path / "me@7").mkdir()
  place = str(tmp_path / "me@7")
  assert runs.split_place(place, "key") == (place, None)
  assert runs.split_place(f"{place}@3", "key") == (place, 3)
