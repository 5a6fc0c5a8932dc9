"""From strings to objects: keys, names, types, resuming, files."""

import json
import pathlib

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax import main
from bcm_jax.config import build
from bcm_jax.config import resolve
from tests import teachers

SHIPPED = resolve.shipped_configs()


def digits(**overrides: str):
  raw = resolve.read_file("configs/digits.py")
  return resolve.resolve(
      raw, {k.replace("__", "."): v for k, v in overrides.items()}
  )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_resolve_and_build(path):
  config = resolve.resolve(resolve.read_file(str(path)))
  with teachers.there(path.name):
    experiment = build.build(config)
  assert experiment.method.sigma_min == config.method.sigma_min
  assert experiment.method.network.model_channels == (
      config.model.model_channels
  )


def test_other_networks_train_as_the_sampled_one_by_default():
  raw = resolve.read_file("configs/digits_dmd.py")
  config = resolve.resolve(raw, {"auxiliary_optimizer.learning_rate": "0.5"})
  student = config.optimizer.to_dict()
  auxiliary = config.auxiliary_optimizer.to_dict()
  assert auxiliary == student | {"learning_rate": 0.5}
  with pytest.raises(errors.UserError, match="auxiliary_optimizer"):
    digits(auxiliary_optimizer__learning_rate="0.5")


def test_resolved_config_survives_json():
  config = digits()
  again = resolve.resolve(json.loads(json.dumps(resolve.to_json(config))))
  assert again.to_dict() == config.to_dict()
  assert resolve.digest(again) == resolve.digest(config)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.grad_clip", "None", None),
        ("optimizer.grad_clip", "2", 2.0),
        ("model.channel_mult", "1,2,2", (1, 2, 2)),
        ("model.channel_mult", "(1, 2)", (1, 2)),
        ("model.attention_resolutions", "4", (4,)),
        ("model.attention_resolutions", "()", ()),
        ("model.attention_resolutions", "", ()),
        ("model.qkv_norm", "false", False),
        ("training.num_steps", "12", 12),
        ("eval.samplers", "onestep,zigzag", ("onestep", "zigzag")),
        ("sample.times", "2.5", (2.5,)),
        ("seed", "7", 7),
    ],
)
def test_overrides_take_the_type_of_their_key(key, text, value):
  config = digits(**{key: text})
  section, _, name = key.rpartition(".")
  found = config[section][name] if section else config[name]
  assert found == value
  assert type(found) is type(value)


@pytest.mark.parametrize(
    "key, text, said",
    [
        ("method.sigma_dta", "1", "'method.sigma_data'"),
        ("methd.s0", "1", "'method'"),
        ("method.name", "bmc", "'bcm'"),
        ("model.name", "admm", "'adm'"),
        ("data.name", "digit", "'digits'"),
        ("method.metric", "l3", "'l2'"),
        ("method.preconditioning", "bc", "'bcm'"),
        ("optimizer.name", "radm", "'radam'"),
        ("training.num_steps", "1.5", "training.num_steps"),
        ("model.qkv_norm", "1", "model.qkv_norm"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate"),
        ("model.channel_mult", "1,x", "model.channel_mult"),
        ("training.num_steps", "0", "training.num_steps"),
        ("training.ema_rates", "1.5", "1.5"),
        ("training.ema_stds", "-0.1,", "training.ema_stds"),
        ("optimizer.learning_rate", "-1e-4", "optimizer.learning_rate"),
        ("optimizer.learning_rate", "1e400", "optimizer.learning_rate"),
        ("optimizer.learning_rate", "nan", "optimizer.learning_rate"),
        ("optimizer.b1", "1.0", "optimizer.b1"),
        ("optimizer.b2", "-0.1", "optimizer.b2"),
        ("optimizer.eps", "0.0", "optimizer.eps"),
        ("optimizer.weight_decay", "-1.0", "optimizer.weight_decay"),
        ("optimizer.grad_clip", "0.0", "optimizer.grad_clip"),
        ("optimizer.warmup_steps", "-5", "optimizer.warmup_steps"),
        ("optimizer.schedule_steps", "0", "optimizer.schedule_steps"),
        ("optimizer.final_fraction", "2.0", "optimizer.final_fraction"),
        ("method.sigma_max", "1e999", "method.sigma_max"),
        ("model.channel_mult", "1,1,1,1,1", "model.channel_mult"),
        ("model.out_channels", "3", "model.out_channels"),
        ("model.num_classes", "5", "model.num_classes"),
        ("model.num_groups", "7", "model.num_groups"),
        ("model.two_time", "False", "model.two_time"),
        ("method.bins", "continuous", "method.bins"),
        ("method.sigma_min", "90", "sigma_min"),
        ("method.s0", "1000", "s0"),
        ("seed.x", "1", "seed"),
        ("a.b.c", "1", "a.b.c"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(key, text, said):
  with pytest.raises(errors.UserError) as caught:
    build.build(digits(**{key: text}))
  assert said in str(caught.value)
  assert "\n" not in str(caught.value)


def test_spans_follow_num_steps_unless_set():
  config = digits(training__num_steps="123")
  raw = resolve.read_file("configs/digits.py")
  if "curriculum_steps" not in raw.method:
    assert config.method.curriculum_steps == 123
  assert digits(method__curriculum_steps="77").method.curriculum_steps == 77


def test_resume_allows_free_keys_and_more_steps():
  run = digits(training__num_steps="100")
  resolve.check_resume(run, digits(
      training__num_steps="100", log__every_steps="7", sample__seed="3",
      checkpoint__keep="9", eval__k="5",
  ))
  resolve.check_resume(run, digits(
      training__num_steps="150", method__curriculum_steps="100",
      optimizer__schedule_steps="100",
  ))


@pytest.mark.parametrize(
    "key, text, named",
    [
        ("training.num_steps", "150", "method.curriculum_steps"),
        ("training.num_steps", "50", "training.num_steps"),
        ("seed", "1", "seed"),
        ("training.batch_size", "32", "training.batch_size"),
        ("method.s1", "320", "method.s1"),
        ("model.dropout", "0.1", "model.dropout"),
        ("optimizer.learning_rate", "0.5", "optimizer.learning_rate"),
    ],
)
def test_resume_refuses_another_run(key, text, named):
  run = digits(training__num_steps="100")
  asked = {"training.num_steps": "100", key: text}
  with pytest.raises(errors.UserError, match=named) as caught:
    resolve.check_resume(run, digits(**asked))
  assert "--workdir" in str(caught.value)


def test_refused_stretch_says_how_to_keep_the_curriculum():
  run = digits(training__num_steps="100")
  with pytest.raises(errors.UserError) as caught:
    resolve.check_resume(run, digits(training__num_steps="150"))
  assert "--config.method.curriculum_steps=100" in str(caught.value)


def test_a_runs_own_config_serves_training(tmp_path, monkeypatch):
  run = digits(training__num_steps="100", optimizer__learning_rate="0.5")
  resolve.write(run, str(tmp_path))
  assert resolve.load(None, {}, str(tmp_path)).to_dict() == run.to_dict()
  more = resolve.load(None, {"training.num_steps": "150"}, str(tmp_path))
  assert more.method.curriculum_steps == more.optimizer.schedule_steps == 100
  resolve.check_resume(run, more)
  trained = []
  changed = main.MODES["train"]._replace(function=lambda *a: trained.append(a))
  monkeypatch.setitem(main.MODES, "train", changed)
  monkeypatch.setattr(main, "_connect", lambda *a: None)
  with pytest.raises(SystemExit):
    main.main(["bcm_jax", f"--workdir={tmp_path}"])
  ((config, workdir),) = trained
  assert config.to_dict() == run.to_dict() and workdir == str(tmp_path)
  with pytest.raises(errors.UserError, match="--config: got None"):
    resolve.load(None, {}, str(tmp_path / "none"))


@pytest.mark.parametrize("key, text", [
    ("training.batch_size", "32"), ("optimizer.learning_rate", "0.5"),
    ("method.s1", "320"),
])
def test_refused_changes_name_both_values_and_the_way_on(key, text):
  run = digits()
  with pytest.raises(errors.UserError) as caught:
    resolve.check_resume(run, digits(**{key: text}))
  section, name = key.split(".")
  assert f"{key} is {run[section][name]!r} there" in str(caught.value)
  assert "--config.training.init_from=" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_files_are_found_from_any_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert resolve.find_file("configs/digits.py").is_file()
  assert resolve.find_file("digits.py").is_file()
  with pytest.raises(errors.UserError, match="'digits.py'"):
    resolve.find_file("configs/digit.py")
  own = tmp_path / "own.py"
  own.write_text("def get_config(arg='a'):\n  return {'seed': arg}\n")
  assert resolve.read_file("own.py:b") == {"seed": "b"}
  own.write_text("x = 1\n")
  with pytest.raises(errors.UserError, match="get_config"):
    resolve.read_file("own.py")


def test_damaged_config_of_a_run(tmp_path):
  assert resolve.of_run(str(tmp_path)) is None
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(errors.UserError, match="config.json"):
    resolve.of_run(str(tmp_path))


@pytest.mark.parametrize("content", [b"[]", b'{"method": 3}', b"\x9a\xff"])
def test_config_of_a_run_that_is_none(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(errors.UserError, match="config.json|method.name"):
    resolve.of_run(str(tmp_path))


@pytest.mark.parametrize("path", ["configs/digits.py:nope", "README.md"])
def test_files_that_are_no_config(path):
  if path == "README.md":
    path = str(pathlib.Path(__file__).parents[2] / path)
  with pytest.raises(errors.UserError, match="--config"):
    resolve.read_file(path)


def test_a_conditional_network_needs_labels(tmp_path):
  images = np.zeros((3, 8, 8, 1), np.uint8)
  np.savez(tmp_path / "train.npz", arr_0=images)
  with pytest.raises(errors.UserError, match="model.num_classes"):
    build.build(
        digits(data__name="npz", data__path=str(tmp_path / "train.npz"))
    )
  free = digits(
      data__name="npz", data__path=str(tmp_path / "train.npz"),
      model__num_classes="none",
  )
  built = build.build(free)
  assert tuple(built.config.data.image_shape) == (8, 8, 1)
  # What the files held is remembered where they are not.
  (tmp_path / "train.npz").unlink()
  assert build.build(built.config).image_shape == (8, 8, 1)
  with pytest.raises(errors.UserError, match="data.path"):
    build.build(free)


def test_augmentation_must_be_told_to_the_network():
  with pytest.raises(errors.UserError, match="model.augment_dim=9"):
    build.build(digits(data__augment="0.12"))
  built = build.build(
      digits(data__augment="0.12", model__augment_dim="9")
  )
  assert built.step_options(built.backend()).augment.p == 0.12
  plain = build.build(digits())
  assert plain.step_options(plain.backend()).augment is None


def test_another_method_refuses_what_it_does_not_use():
  with pytest.raises(errors.UserError, match="bidirectional_weight"):
    digits(method__name="ict")
