"""Modes eval, search and reference over checkpoints that nobody trained."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import recovery
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.diffusion import schedules
from bcm_jax.evaluation import evaluate
from bcm_jax.evaluation import references
from bcm_jax.evaluation import tables
from bcm_jax.evaluation import time_search
from bcm_jax.metrics import feature_extractors
from bcm_jax.metrics import quality
from bcm_jax.metrics import reference_stats
from bcm_jax.training import metric_writers
from tests import toys

pytestmark = pytest.mark.slow

TINY = {
    **toys.TINY,
    "training.num_steps": "4", "training.ema_rates": "0.5,0.9",
    "sample.batch_size": "32", "sample.times": "2.5", "invert.num_images": "16",
    "eval.num_samples": "24", "eval.num_real_for_prdc": "50",
    "eval.samplers": "onestep,", "eval.inversion_nfe": "1,",
}


def experiment(**overrides: str) -> build.Experiment:
  values = TINY | {k.replace("__", "."): v for k, v in overrides.items()}
  return build.build(
      resolve.resolve(resolve.read_file("configs/digits.py"), values)
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
  """A run with checkpoints at steps 2 and 4, of random parameters."""
  built, folder = experiment(), str(tmp_path_factory.mktemp("run"))
  resolve.write(built.config, folder)
  state = jax.jit(lambda: build.create_state(built))()
  rng = np.random.default_rng(0)
  with checkpoint.Checkpoints(runs.checkpoint_dir(folder), None) as saved:
    for step in (2, 4):
      # The last layer starts at zero: other weights, other images.
      state = jax.tree.map(
          lambda x: x + np.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
          if np.issubdtype(x.dtype, np.floating) else x, state,
      )
      saved.save(step, state, {})
  return folder


def results(folder) -> dict[str, dict]:
  paths = (folder / "eval").glob("*.json")
  return {p.stem: json.loads(p.read_text()) for p in paths}


@pytest.fixture
def copy(run, tmp_path):
  """A copy of the run that a test may write to."""
  shutil.copytree(run, tmp_path / "copy")
  return tmp_path / "copy"


def test_fewer_samples_than_the_protocol_need_a_flag():
  few = experiment(eval__allow_fewer_samples="false")
  with pytest.raises(errors.UserError, match="eval.allow_fewer_samples"):
    evaluate.check_before_training(few)
  for fine in ({"eval__num_samples": "50000"}, {"eval__at_end": "false"}):
    evaluate.check_before_training(
        experiment(eval__allow_fewer_samples="false", **fine)
    )
  with pytest.raises(errors.UserError, match="eval.seeds"):
    evaluate.check_before_training(experiment(eval__seeds="()"))


def test_training_may_end_with_pictures_alone(copy, capsys):
  quiet = experiment(eval__at_end="false", sample__num_samples="20")
  _, average, params = runs.load_run(quiet, str(copy))
  assert evaluate.finish(quiet, str(copy), 4, average, params) is None
  assert not (copy / "eval").exists()
  assert (copy / "overview.png").exists()
  assert "--mode=eval" in capsys.readouterr().out


def on_the_board(workdir) -> dict[str, list[int]]:
  """Names that TensorBoard shows of evaluations, with their steps."""
  from tensorboard.backend.event_processing import event_file_loader

  shown: dict[str, list[int]] = {}
  for path in sorted((workdir / "tensorboard" / "eval").glob("*tfevents*")):
    for event in event_file_loader.EventFileLoader(str(path)).Load():
      for value in event.summary.value:
        shown.setdefault(value.tag, []).append(event.step)
  return shown


def test_tensorboard_shows_numbers_and_grids(copy):
  evaluate.run(
      experiment(eval__steps="all", eval__samplers="onestep,ancestral@3"),
      str(copy),
  )
  shown = on_the_board(copy)
  for name in ("onestep_nfe1", "ancestral_nfe2@3"):
    assert shown[name] == [2, 4]
    assert shown[f"{name}/FD (raw pixels)"] == [2, 4]
    assert f"{name}/nfe" not in shown
  assert any(name.startswith("inversion_") for name in shown)


def test_tensorboard_shows_the_images_at_the_end_of_training(copy):
  quiet = experiment(eval__at_end="false", sample__num_samples="20")
  _, average, params = runs.load_run(quiet, str(copy))
  evaluate.finish(quiet, str(copy), 4, average, params)
  shown = on_the_board(copy)
  assert shown["samples/onestep_nfe1"] == [4]
  assert {name.partition("/")[0] for name in shown} == {
      "samples", "inversions", "edits"
  }


def test_evaluation_without_tensorflow(copy, monkeypatch):
  monkeypatch.setattr(metric_writers, "import_clu", lambda module: None)
  evaluate.run(experiment(), str(copy))
  assert results(copy)["4"]
  assert not (copy / "tensorboard").exists()


def test_seeds_are_told_one_by_one_with_mean_and_spread(copy):
  evaluate.run(experiment(eval__seeds="3,5,8"), str(copy))
  result = results(copy)["4"]
  r = result["samplers"]["onestep_nfe1"]
  assert list(r["seeds"]) == ["3", "5", "8"]
  distances = [s["FD (raw pixels)"] for s in r["seeds"].values()]
  assert len(set(distances)) == 3
  assert r["FD (raw pixels)"] == pytest.approx(np.mean(distances))
  assert r["std"]["FD (raw pixels)"] == pytest.approx(
      np.std(distances, ddof=1)
  )
  assert result["protocol"]["seeds"] == [3, 5, 8]
  # A seed's numbers do not depend on which others are asked for.
  evaluate.run(experiment(eval__seeds="5,"), str(copy))
  alone = results(copy)["4"]["samplers"]["onestep_nfe1"]
  assert alone["seeds"]["5"] == r["seeds"]["5"]
  assert alone["std"]["FD (raw pixels)"] is None


def test_averages_and_checkpoints_in_one_command(copy, capsys):
  evaluate.run(
      experiment(eval__averages="ema_0.9,params", eval__steps="all",
                 eval__samplers="onestep,ancestral@3,ancestral@3/1"),
      str(copy),
  )
  found = results(copy)
  assert set(found) == {
      "2_ema_0.9", "2_params", "4_ema_0.9", "4_params"
  }
  for name, result in found.items():
    step, average = name.split("_", 1)
    assert (result["step"], result["average"]) == (int(step), average)
    assert set(result["samplers"]) == {
        "onestep_nfe1", "ancestral_nfe2@3", "ancestral_nfe3@3/1"
    }
  distances = {
      r["samplers"]["onestep_nfe1"]["FD (raw pixels)"] for r in found.values()
  }
  assert len(distances) == 4
  assert "few samples: 24 of the protocol's 50000" in capsys.readouterr().out


def test_one_checkpoint_of_several(copy):
  evaluate.run(experiment(eval__steps="2"), str(copy))
  assert list(results(copy)) == ["2"]
  with pytest.raises(errors.UserError, match="3"):
    evaluate.run(experiment(eval__steps="3"), str(copy))


def test_following_ends_with_the_runs_last_step(copy, monkeypatch):
  """A checkpoint that comes while it waits is evaluated, then it is done."""
  late, waited = copy / "checkpoints" / "4", []
  hidden = copy / "hidden"
  late.rename(hidden)

  def sleep(seconds):
    waited.append(seconds)
    assert list(results(copy)) == ["2"]
    hidden.rename(late)

  monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(sleep=sleep))
  evaluate.run(experiment(eval__steps="follow"), str(copy))
  assert set(results(copy)) == {"2", "4"}
  assert len(waited) == 1


def brightness(images):
  """Features of a user: mean and contrast of each image."""
  return np.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)


def test_a_users_features_and_their_reference(copy, capsys):
  own = experiment(eval__features=f"{__name__}:brightness")
  path = references.run(own, str(copy))
  assert "written" in capsys.readouterr().out
  with np.load(path) as f:  # What ADM's evaluator reads.
    assert f["mu"].shape == (2,) and f["sigma"].shape == (2, 2)
    assert f["arr_0"].shape == (50, 8, 8, 1)
    train_images = own.source("train").fetch(np.arange(1437))["image"]
    np.testing.assert_allclose(f["mu"], brightness(train_images).mean(0))
    np.testing.assert_allclose(
        f["sigma"], np.cov(brightness(train_images), rowvar=False), rtol=1e-6
    )
  evaluate.run(
      experiment(eval__features=f"{__name__}:brightness",
                 eval__reference=path), str(copy)
  )
  result = results(copy)["4"]
  name = f"FD ({__name__}:brightness)"
  assert name in result["samplers"]["onestep_nfe1"]
  assert result["protocol"]["reference"].startswith("digits/train: 1437")
  with pytest.raises(errors.UserError, match="features"):
    evaluate.run(experiment(eval__reference=path), str(copy))


def test_images_alone_are_a_reference_too(copy):
  path = copy / "samples.npz"
  images = experiment().source("train").fetch(np.arange(60))["image"]
  np.savez(path, arr_0=images)
  target = references.open_target(
    experiment(eval__reference=str(path)),
    feature_extractors.Pixels(),
    str(copy),
  )
  flat = images.reshape(60, -1) / 255
  np.testing.assert_allclose(
    target.reference.pooled.mean, flat.mean(0), atol=1e-6
  )
  assert target.reference.count == 60
  assert len(target.real) == 50
  assert target.reference.data == "samples.npz"


def without_images(reference, **overrides):
  """Digits' network where only statistics are at hand, no data set."""
  return experiment(
    data__name="none",
    data__image_shape="(8,8,1)",
    data__num_classes="10",
    eval__reference=reference,
    **overrides,
  )


def test_a_reference_alone_serves_where_there_are_no_images(copy, capsys):
  """What a converted checkpoint is measured by: EDM's files, or ADM's."""
  full = references.run(experiment(), str(copy))
  with np.load(full) as f:
    np.savez(copy / "edm.npz", mu=f["mu"], sigma=f["sigma"])
  evaluate.run(without_images(str(copy / "edm.npz")), str(copy))
  bare = results(copy)["4"]
  evaluate.run(without_images(full), str(copy))
  with_images = results(copy)["4"]
  a, b = (r["samplers"]["onestep_nfe1"] for r in (bare, with_images))
  assert a["FD (raw pixels)"] == b["FD (raw pixels)"]
  assert "precision" not in a and "KID" not in a
  assert 0 <= b["precision"] <= 1
  assert bare["protocol"]["num_real_for_prdc"] == 0
  assert bare["inversion"] == {}
  assert "no test images" in capsys.readouterr().out
  assert "an unknown number of images" in tables.render({"edm": bare})


def test_numbers_that_are_not_finite_have_no_mean():
  assert quality.spread([1.0, None]) == {"mean": None, "std": None}
  assert quality.spread([1.0, 3.0])["mean"] == 2.0


def test_a_run_goes_on_with_its_own_images_alone(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
  for name, shift in (("a", 0), ("b", 1), ("moved", 0)):
    np.savez(tmp_path / f"{name}.npz", arr_0=images + np.uint8(shift))

  def source(name):
    built = experiment(
      data__name="npz",
      data__path=str(tmp_path / f"{name}.npz"),
      model__num_classes="none",
    )
    return built.source("train")

  def fixed(name):
    found = image_source.fingerprint(source(name))
    return {"data_fingerprint": found, "frozen": {}}

  recovery.check_unchanged(fixed("a"), fixed("moved"), "npz", {})
  recovery.check_unchanged({}, fixed("b"), "npz", {})
  with pytest.raises(errors.UserError, match="data.path"):
    recovery.check_unchanged(fixed("a"), fixed("b"), "npz", {})


def test_statistics_of_the_training_split_are_taken_once(copy, monkeypatch):
  built, folder = experiment(), str(copy / "eval")
  first = references.open_target(built, feature_extractors.Pixels(), folder)
  monkeypatch.setattr(references, "compute", None)
  again = references.open_target(built, feature_extractors.Pixels(), folder)
  assert again.reference.digest() == first.reference.digest()
  fingerprint = image_source.fingerprint(built.source("train"))
  assert fingerprint in first.reference.data
  saved = reference_stats.load_reference(
    f"{folder}/reference_pixels_{fingerprint}.npz"
  )
  assert saved.digest() == first.reference.digest()


@pytest.mark.parametrize(
  "overrides, said",
  [
    ({"eval__features": "dino"}, "eval.features.*'dino'"),
    ({"eval__features": "inception"}, "eval.features_path"),
    (
      {"eval__features": "classifier", "eval__features_path": "/nowhere"},
      "/nowhere",
    ),
    ({"eval__features": "no_such_module:f"}, "no_such_module"),
    ({"eval__features": f"{__name__}:nothing"}, "nothing"),
    ({"eval__reference": "/nowhere.npz"}, "/nowhere.npz"),
    ({"eval__samplers": "onestep:3"}, "onestep"),
    ({"eval__inversion_noise": "500,"}, "500"),
    ({"eval__inversion_baseline": "/nowhere"}, "/nowhere"),
    ({"eval__averages": "ema_0.7,"}, "ema_0.7"),
    ({"eval__steps": "lats"}, "'last'"),
  ],
)
def test_bad_requests_say_what_to_do(run, tmp_path, overrides, said):
  with pytest.raises(errors.UserError, match=said):
    asked = experiment(**overrides)
    evaluation = evaluate.Evaluation(asked, str(tmp_path))
    runs.load_run(asked, run, *evaluation.section.averages)


def test_a_bidirectional_network_is_no_baseline(run):
  with pytest.raises(errors.UserError, match="eval.inversion_baseline"):
    evaluate.check_outputs(experiment(eval__inversion_baseline=run))


def test_inversion_is_a_curve_over_noise_and_evaluations(copy):
  evaluate.run(
    experiment(eval__inversion_nfe="1,2", eval__inversion_noise="0.07,0.3"),
    str(copy),
  )
  inversion = results(copy)["4"]["inversion"]
  assert set(inversion) == {"nfe1", "nfe2", "nfe1_noise0.3", "nfe2_noise0.3"}
  assert [r["noise"] for r in inversion.values()] == [0.07, 0.07, 0.3, 0.3]
  for r in inversion.values():
    assert r["psnr"] == pytest.approx(-10 * np.log10(r["mse"]))
    assert "ssim" not in r  # 8x8 images hold no window of 11.
  picture = copy / "eval" / "4_inversion.png"
  assert picture.read_bytes().startswith(b"\x89PNG")


def ddim_factor(times, sd):
  """What DDIM makes of x with the optimal denoiser of N(0, sd^2)."""
  factor = 1.0
  for t, u in zip(times[:-1], times[1:], strict=True):
    factor *= u / t + (1 - u / t) * sd**2 / (sd**2 + t**2)
  return factor


def test_baselines_are_the_odes_of_a_denoiser(copy, tmp_path):
  """A fresh network's F is 0: every inversion of it is a known factor."""
  teacher = build.build(
    resolve.resolve(
      resolve.read_file("configs/digits_ict.py"),
      TINY | {"method.preconditioning": "bcm", "eval.samplers": "onestep,"},
    )
  )
  folder = str(tmp_path / "teacher")
  resolve.write(teacher.config, folder)
  state = jax.jit(lambda: build.create_state(teacher))()
  with checkpoint.Checkpoints(runs.checkpoint_dir(folder)) as saved:
    saved.save(1, state, {})
  evaluate.run(
    experiment(
      eval__inversion_baseline=folder, eval__inversion_baseline_nfe="1,4"
    ),
    str(copy),
  )
  found = results(copy)["4"]["inversion"]
  assert {k for k in found if k.startswith(("DDIM", "EDM"))} == {
    "DDIM_nfe1_noise0.002",
    "DDIM_nfe4_noise0.002",
    "EDM Heun_nfe4_noise0.002",
  }
  method = teacher.method
  images = teacher.source("test").fetch(np.arange(16) * 360 // 16)["image"]
  for nfe in (1, 4):
    up = schedules.karras_sigmas(nfe + 1, 0.002, method.sigma_max)
    factor = ddim_factor(up, method.sigma_data) * ddim_factor(
      up[::-1], method.sigma_data
    )
    back = image_source.to_uint8(factor * image_source.to_float(images))
    mse = np.mean((back / 255.0 - images / 255.0) ** 2)
    r = found[f"DDIM_nfe{nfe}_noise0.002"]
    assert r["mse"] == pytest.approx(mse, rel=1e-3, abs=1e-6)
    assert r["nfe"] == nfe


def test_search_writes_what_it_measured_and_its_plot(copy, monkeypatch, capsys):
  asked = experiment(search__mid_times="1,3", search__num_samples="24")
  found = time_search.run(asked, str(copy))
  assert set(found["costs"]) == {"ancestral@3", "ancestral@1"}
  assert found["best"] == min(found["costs"], key=found["costs"].get)
  (path,) = (copy / "search").glob("*.json")
  assert json.loads(path.read_text()) == found
  assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  # The cost is the distance that mode eval reports with as many samples.
  evaluate.run(experiment(eval__samplers=f"{found['best']},"), str(copy))
  (r,) = results(copy)["4"]["samplers"].values()
  assert r["FD (raw pixels)"] == pytest.approx(found["costs"][found["best"]])
  monkeypatch.setattr(evaluate.Evaluation, "distance", None)
  assert time_search.run(asked, str(copy))["costs"] == found["costs"]
