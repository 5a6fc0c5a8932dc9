"""Teachers and students end to end: named, refused, frozen, resumed."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax import sample
from bcm_jax import train
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.data import pairs as pair_files
from bcm_jax.evaluation import bits_per_dim
from bcm_jax.evaluation import evaluate
from bcm_jax.evaluation import inversion
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.generate import teacher_pairs
from bcm_jax.sampling import sampling_plan
from bcm_jax.tools import inspect_config
from tests import toys

pytestmark = pytest.mark.slow

TINY = {
    **toys.TINY,
    "training.num_steps": "4", "training.batch_size": "16",
    "training.ema_rates": "0.5,", "checkpoint.every_steps": "2",
    "checkpoint.keep": "none", "sample.batch_size": "32",
    "eval.num_samples": "24", "eval.num_real_for_prdc": "50",
    "optimizer.schedule": "constant", "optimizer.warmup_steps": "0",
}


@pytest.fixture(autouse=True, scope="module")
def unfinished():
  """Leaves out the pictures at the end of training."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, "finish", lambda *args: None)
    yield


def resolved(file, **overrides):
  values = TINY | {k.replace("__", "."): v for k, v in overrides.items()}
  return resolve.resolve(resolve.read_file(file), values)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  folder = tmp_path_factory.mktemp("edm")
  config = resolved("digits_edm.py", method__label_dropout="0.2",
                   sample__num_levels="4")
  train.train_and_evaluate(config, str(folder))
  teacher_pairs.run(
      build.build(
          resolve.of_run(str(folder), {"sample.num_samples": "40"})
      ), str(folder),
  )
  return folder


def student(file, teacher, **overrides):
  # One takes the teacher's features; the others compile sooner.
  metric = "features" if file.endswith("cd.py") else "l2"
  settings = dict(method__teacher=str(teacher), method__metric=metric)
  if file.endswith(":dmd"):
    settings["data__pairs"] = str(teacher / "pairs.npz")
  if file.endswith(":gan"):
    settings |= dict(training__init_from="none", method__gan_features="4")
  if file.endswith(":dmd2"):
    settings["method__gan_features"] = "4"
  return resolved(file, **(settings | overrides))


def tree(folder, step):
  _, state, meta = checkpoint.Checkpoints(
      pathlib.Path(folder) / "checkpoints"
  ).read_raw(step)
  return state, meta


def snapshot(folder):
  return {p: p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*"))
          if p.is_file()}


UPDATES = {
    "digits_cd.py": {"student": 4},
    "digits_ctm.py:gan": {"student": 2, "discriminator": 2},
    "digits_dmd.py:dmd2": {"student": 1, "fake_score": 4},
    "digits_dmd.py:dmd": {"student": 4, "fake_score": 4},
}
# At rate 0, so that what it started from is seen.
STILL = dict(
    optimizer__learning_rate="0.0", auxiliary_optimizer__learning_rate="0.0",
    optimizer__weight_decay="0.0",
)


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
  """File -> (config, work directory) of a run from the teacher, made once."""
  @functools.cache
  def run(file):
    config = student(file, teacher, **(STILL if "dmd2" in file else {}))
    folder = tmp_path_factory.mktemp("student")
    assert not train.train_and_evaluate(config, str(folder)).frozen
    return config, folder

  return run


@pytest.mark.parametrize("file", UPDATES)
def test_a_student_trains(teacher, trained, file):
  before = snapshot(teacher)
  config, folder = trained(file)
  state, meta = tree(folder, 4)
  assert not state.get("frozen") and list(meta["frozen"]) == ["teacher"]
  assert snapshot(teacher) == before
  updates = {k: int(p["num_updates"]) for k, p in state["networks"].items()}
  assert updates == UPDATES[file]
  last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
  numbers = json.loads(last)
  many = len(updates) > 1
  for name in updates:  # What took turns is told of each.
    assert np.isfinite(numbers[f"{name}/loss" if many else "loss"])
  text = inspect_config.report(config, str(folder), None)
  assert "starts from the teacher" in text
  levels = {"cd": "start level t", "ctm": "sigma of L_DSM",
            "dmd": "sigma of the fake score"}
  assert levels[config.method.name.rstrip("2")] in text


@pytest.mark.parametrize("file", UPDATES)
def test_a_student_is_used_without_its_teacher(trained, tmp_path, file):
  config, folder = trained(file)
  gone = {"method.teacher": str(tmp_path / "gone"), "sample.num_samples": "4"}
  config = resolve.resolve(config.to_dict(), gone)
  with pytest.raises(errors.UserError, match="gone, which has no config.json"):
    build.build(config)
  built = build.build(config, to_train=False)
  _, _, params = runs.load_run(built, str(folder))
  with_it = build.build(trained(file)[0])
  images = [
    batched_sampler.generate(
      e,
      batched_sampler.BatchedSampler(e, params, 4),
      planning.plan_of(e, "onestep"),
      np.arange(4),
      np.arange(4),
      seed=0,
    )
    for e in (built, with_it)
  ]
  np.testing.assert_array_equal(*images)


def test_inspection_tells_the_levels_of_a_denoiser():
  text = inspect_config.report(resolved("digits_edm.py"), None, None)
  levels = text.partition("== levels\n")[2].partition("\n\n==")[0]
  head, *rows = levels.splitlines()
  assert head == "sigma (20000 draws)" and len(rows) == 12
  # Log-normal about exp(-0.8): below 0.29 in a share of Phi(-0.33) = 0.37.
  shares = [float(row.split("%")[0].split()[-1]) for row in rows]
  assert sum(shares) == pytest.approx(100, abs=1)
  assert sum(shares[:6]) == pytest.approx(37, abs=2)


def test_turns_go_on_where_they_were(trained, tmp_path):
  config, folder = trained("digits_ctm.py:gan")
  shutil.copytree(folder, tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
  train.train_and_evaluate(config, str(tmp_path / "again"))
  toys.assert_equal(tree(tmp_path / "again", 4)[0], tree(folder, 4)[0])


def test_students_start_as_their_teacher(teacher, trained):
  networks = tree(trained("digits_dmd.py:dmd2")[1], 4)[0]["networks"]
  expected = tree(teacher, 4)[0]["averages"]["ema_0.5"]
  toys.assert_close(networks["student"]["params"], expected, rtol=1e-6)
  toys.assert_close(
    networks["fake_score"]["params"]["network"], expected, rtol=1e-6
  )


def test_another_teacher_stops_a_run_that_goes_on(teacher, trained, tmp_path):
  _, folder = trained("digits_cd.py")
  shutil.copytree(folder, tmp_path / "run")
  # Moved is fine, of other weights is not.
  shutil.copytree(teacher, tmp_path / "moved")
  config = student("digits_cd.py", tmp_path / "moved")
  train.train_and_evaluate(config, str(tmp_path / "run"))
  shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
  with pytest.raises(errors.UserError, match="method.teacher: got weights"):
    train.train_and_evaluate(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
  "file, overrides, said",
  [
    ("digits_cd.py", {"method__teacher": "none"}, "expected the work dir"),
    ("digits_cd.py", {"method__teacher": "/nowhere"}, "config.json"),
    ("digits_cd.py", {"model__num_classes": "none"}, "classes 10, expected"),
    ("digits_cd.py", {"method__sigma_data": "0.5"}, "sigma_data 0.75, exp"),
    ("digits_cd.py", {"data__augment": "0.1", "model__augment_dim": "9"},
     "method.teacher: .* with model.augment_dim=0, expected 9"),
    ("digits_ctm.py:gan", {"method__teacher": "none"}, "gan_encoder='teacher'"),
    ("digits_ctm.py:dsm", {"model__end_branch": "align"}, "in every block"),
    ("digits_dmd.py:dmd", {"data__pairs": "none"}, "data.pairs: got None"),
    ("digits_dmd.py:dmd", {"data__flip": "true"}, "data.flip=True"),
    ("digits_dmd.py:dmd2", {"model__two_time": "true"}, "without end level"),
  ],
)
def test_what_does_not_fit_is_refused(teacher, file, overrides, said):
  with pytest.raises(errors.UserError, match=said):
    build.build(student(file, teacher, **overrides))


def test_a_network_of_another_width_is_refused(teacher, tmp_path):
  config = student("digits_cd.py", teacher, model__model_channels="16")
  with pytest.raises(errors.UserError, match=r"method.teacher=.*do not fit"):
    train.train_and_evaluate(config, str(tmp_path))


def test_a_student_is_no_teacher(trained):
  _, folder = trained("digits_cd.py")
  with pytest.raises(errors.UserError, match="expected a denoiser"):
    build.build(student("digits_cd.py", folder))


# Pairs ------------------------------------------------------------------------


def test_pairs_are_what_the_solver_makes_of_their_noise(teacher):
  source = pair_files.PairSource(str(teacher / "pairs.npz"), (8, 8, 1), 10)
  assert len(source) == 40 and source.facts["plan"][0].startswith("heun: 7 NFE")
  examples = source.fetch(np.array([3, 17]))
  assert examples["noise"].dtype == np.float16
  built = build.build(resolve.of_run(str(teacher)))
  _, _, params = runs.load_run(built, str(teacher))
  runner = batched_sampler.BatchedSampler(built, params, 8)
  plan = planning.plan_of(built)
  out = runner(
    plan, examples["noise"].astype(np.float32) * 40, examples["label"], None
  )
  # Without the floor's bias of half a gray level.
  stored = image_source.to_float(examples["image"])
  error = (stored - np.clip(out, -1, 1)) * 127.5
  assert np.abs(error).max() < 0.51 and abs(error.mean()) < 0.15
  noise = source.fetch(np.arange(40))["noise"].astype(float)
  assert np.std(noise) == pytest.approx(1, abs=0.05)


def test_files_that_hold_no_pairs(teacher, tmp_path):
  np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
  for path in (tmp_path / "none.npz", tmp_path / "other.npz"):
    with pytest.raises(errors.UserError, match="data.pairs: "):
      pair_files.PairSource(str(path), (8, 8, 1), 10)
  with pytest.raises(errors.UserError, match="of the same data"):
    pair_files.PairSource(str(teacher / "pairs.npz"), (16, 16, 1), 10)


def test_pairs_need_a_solver_that_adds_no_noise(teacher):
  built = build.build(resolve.of_run(str(teacher), {"sample.s_churn": "10"}))
  with pytest.raises(errors.UserError, match="sample.s_churn=10"):
    teacher_pairs.run(built, str(teacher))


# Guidance ---------------------------------------------------------------------


def images(teacher, **overrides):
  values = {k.replace("__", "."): v for k, v in overrides.items()}
  built = build.build(
    resolve.of_run(str(teacher), {"sample.num_samples": "20"} | values)
  )
  _, _, params = runs.load_run(built, str(teacher))
  runner = batched_sampler.BatchedSampler(built, params, 32)
  folder = sample.sample(built, str(teacher / "guided"), runner)
  return np.load(pathlib.Path(folder) / "samples.npz")["arr_0"]


def test_guidance_by_the_network_itself_and_by_a_worse_one(teacher):
  plain = images(teacher)
  by_class = images(teacher, sample__guidance="3.0")
  assert np.any(by_class != plain)
  nowhere = images(
    teacher, sample__guidance="3.0", sample__guidance_interval="(50.,60.)"
  )
  np.testing.assert_array_equal(nowhere, plain)
  by_itself = images(
    teacher, sample__guidance="3.0", sample__guidance_network=str(teacher)
  )
  assert np.abs(by_itself.astype(int) - plain).max() <= 1
  early = images(
    teacher, sample__guidance="3.0", sample__guidance_network=f"{teacher}@2"
  )
  assert np.any(early != plain)


@pytest.mark.parametrize(
  "overrides, said",
  [
    ({"method.label_dropout": "0.0"}, "label dropout"),
    ({"sample.guidance_network": "/nowhere"}, "config.json"),
    ({"sample.guidance_network": "RUN@x"}, "a number after @"),
  ],
)
def test_guides_that_cannot(teacher, overrides, said):
  built = build.build(
    resolve.of_run(str(teacher), {"sample.guidance": "2.0"} | overrides)
  )
  _, _, params = runs.load_run(built, str(teacher))
  with pytest.raises(errors.UserError, match=said):
    batched_sampler.BatchedSampler(built, params, 8)


def test_bits_a_dimension_in_mode_eval(teacher):
  overrides = {"eval.likelihood_images": "8"}
  built = build.build(resolve.of_run(str(teacher), overrides))
  _, _, params = runs.load_run(built, str(teacher))
  numbers = bits_per_dim.measure(built, params)
  assert numbers["images"] == 8 and numbers["nfe"] > 20
  # Grey levels of 17 steps, by a network that learnt nothing in four steps.
  assert 3 < numbers["bits_per_dim"] < 12
  assert "8 test images" in bits_per_dim.summary(numbers)
  cm = build.build(resolved("digits_ict.py", eval__likelihood_images="8"))
  with pytest.raises(errors.UserError, match="eval.likelihood_images"):
    evaluate.check_outputs(cm)


def test_samplers_of_a_denoiser(teacher):
  built = build.build(resolve.of_run(str(teacher)))
  for text, name, nfe in (
    ("heun:5", "heun", 5),
    ("ddim:6", "ddim", 6),
    ("heun", "heun", 7),
  ):
    plan = planning.plan_of(built, text)
    assert (plan.name, plan.nfe, plan.end) == (name, nfe, 0.0)
  with pytest.raises(errors.UserError, match="expected an odd number"):
    planning.plan_of(built, "heun:6")
  cm = build.build(resolved("digits_ict.py"))
  for sampler in ("heun", "ddim"):
    with pytest.raises(errors.UserError, match="that predicts jumps"):
      planning.plan_of(cm, sampler)
  with pytest.raises(errors.UserError, match="guidance needs a denoiser"):
    planning.plan_of(
      build.build(resolved("digits_ict.py", sample__guidance="2.0")), "onestep"
    )
  assert isinstance(
    planning.plan_of(built, "heun").steps[0], sampling_plan.HeunJump
  )


def test_runs_at_a_step(teacher):
  """DIR@STEP of the teacher and of the baseline of inversions."""
  with_step = build.build(student("digits_cd.py", f"{teacher}@2"))
  frozen = build.load_frozen(with_step)["teacher"]
  toys.assert_equal(frozen, tree(teacher, 2)[0]["averages"]["ema_0.5"])
  _, params = inversion._open_baseline(with_step, f"{teacher}@2")
  toys.assert_equal(params, frozen)
  with pytest.raises(errors.UserError, match="3"):
    build.load_frozen(build.build(student("digits_cd.py", f"{teacher}@3")))
  for wrong in ("x", "", "-2"):
    with pytest.raises(errors.UserError, match=r"method\.teacher"):
      build.build(student("digits_cd.py", f"{teacher}@{wrong}"))
