"""Values of every config key and argument: accepted, or refused by name."""

import math
import re

import jax
import numpy as np
import PIL.Image
import pytest

from bcm_jax import __main__ as commands
from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.evaluation import evaluate
from bcm_jax.evaluation import time_search
from tests import toys

RAW = resolve.read_file("configs/digits.py")
BASE = resolve.resolve(RAW, toys.TINY).to_dict()
VALUES = (0, -1, math.nan, math.inf, 2**31, 1e300, 10**400)
CLASSES = {
    "training": [resolve.schema.Training], **{
        k: [v] for k, v in resolve.SECTIONS.items()
    },
    "method": [m.cls for m in registry.METHODS.values()],
    "model": [m.cls for m in registry.MODELS.values()],
}


def changed(key, value) -> dict:
  """Returns the raw config with one other value."""
  section, _, name = key.rpartition(".")
  if not section:
    return BASE | {name: value}
  return BASE | {section: BASE[section] | {name: value}}


def hints() -> dict:
  """Returns 'section.key' -> (type, default) of the keys of all classes."""
  return {
      f"{section}.{key}": hint
      for section, classes in CLASSES.items() for cls in classes
      for key, hint in resolve._keys(cls).items()
  }


NUMERIC = sorted(
    key for key, (hint, _) in hints().items()
    if re.search(r"\b(int|float)\b", str(hint))
)


def test_every_numeric_key_takes_or_refuses_every_number():
  """Refusals name the key; nothing else is raised, huge numbers included."""
  assert len(NUMERIC) > 120
  for key in NUMERIC:
    hint, default = hints()[key]
    accepted = []
    for value in VALUES:
      if "tuple" in str(hint):
        value = (value,)
      try:
        accepted.append(resolve._convert(value, hint, key))
      except errors.UserError as e:
        assert key in str(e) and "\n" not in str(e), key
    assert not any(np.any(np.abs(v) > 2**32) for v in accepted), key
    assert len(accepted) < 3, (key, accepted)
    assert resolve._convert(default, hint, key) == default


@pytest.mark.slow
@pytest.mark.parametrize("key", ["seed", *(k for k in NUMERIC if (
    k.split(".")[1] in BASE[k.split(".")[0]]
))])
def test_accepted_values_build_or_are_refused_by_name(key):
  """The objects of a config with this value, without any computation."""
  section = key.partition(".")[0]
  for value in (0, 1, 2, 3, 0.5, 2**31 - 1, 1e-300, 1e6, ()):
    try:
      experiment = build.build(resolve.resolve(changed(key, value)))
      if section in ("model", "optimizer") and value in (1, 3, 0.5):
        jax.eval_shape(lambda e=experiment: build.create_state(e))
      experiment.optimizer.rate()(5)
      experiment.method.curriculum(3)
      evaluate.check_outputs(experiment)
      time_search.check(experiment)
    except errors.UserError as e:
      assert "\n" not in str(e)


@pytest.mark.parametrize("key, value", [
    ("sample.num_samples", "-1"), ("sample.batch_size", "0"),
    ("invert.num_images", "-1"), ("eval.num_samples", "0"),
    ("search.num_samples", "-1"), ("edit.num_images", "-1"),
    ("model.channel_mult", "()"), ("model.channel_mult", "0,"),
    ("model.model_channels", "0"), ("model.num_res_blocks", "-1"),
    ("model.dropout", "2"), ("method.sigma_data", "0"),
    ("optimizer.learning_rate", "-1"), ("optimizer.learning_rate", "inf"),
    ("optimizer.learning_rate", "1e999"), ("optimizer.learning_rate", "nan"),
    ("optimizer.b1", "1"), ("optimizer.b2", "1.0"), ("optimizer.eps", "0"),
    ("optimizer.grad_clip", "0"), ("checkpoint.keep", "-1"),
    ("checkpoint.keep", "0"), ("seed", "-1"), ("seed", "4294967296"),
    ("sample.seed", "4294967296"), ("eval.seeds", "0,4294967296"),
    ("eval.seeds", "()"), ("edit.seed", "-1"), ("data.size", "0"),
    ("data.augment", "1.5"), ("data.channels", "4"), ("data.threads", "-1"),
    ("training.ema_stds", "0.4,"), ("training.ema_rates", "1,"),
    ("parallel.cpu_devices", "100000"), ("sample.nfe", "2147483647"),
    ("sample.gamma", "1.1"), ("eval.k", "0"), ("search.mid_times", "()"),
    ("model.num_groups", "0"), ("model.num_head_channels", "0"),
    ("method.rho", "0"), ("method.p_std", "0"), ("method.sigma_max", "1e300"),
    ("log.every_steps", "0"), ("sample.times", "(" * 10_000),
    ("optimizer.learning_rate", "1" * 5000), ("eval.reference", " "),
    ("data.path", ""), ("data.image_shape", "8,8"),
])
def test_values_that_no_key_takes(key, value):
  with pytest.raises(errors.UserError, match=re.escape(key)) as caught:
    resolve.resolve(RAW, {key: value})
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_values_at_the_ends_of_a_range():
  for key, value in {
      "seed": 2**32 - 1, "optimizer.b1": 0.0, "data.augment": 1.0,
      "checkpoint.keep": None, "training.max_rollbacks": 0,
      "eval.likelihood_images": 0, "method.p_mean": -3.0,
  }.items():
    resolve.resolve(changed(key, value))


@pytest.mark.parametrize("path, meant", [
    ("batch_size", "training.batch_size"), ("lr", "optimizer.learning_rate"),
    ("learning_rate", "optimizer.learning_rate"),
    ("num_stpes", "training.num_steps"), ("steps", "training.num_steps"),
    ("training.lr", "optimizer.learning_rate"),
    ("training.learning_rate", "optimizer.learning_rate"),
    ("eval.allow_few", "eval.allow_fewer_samples"),
    ("sample.guide", "sample.guidance_network"),
    ("training.hang_secs", "training.watchdog_timeout_secs"),
    ("critic.learning_rate", "auxiliary_optimizer"),
    ("method.bins", "method.time_distribution"),
    ("chanel_mult", "model.channel_mult"),
    ("optimiser.b1", "optimizer"), ("model.batch_size", "training.batch_size"),
])
def test_unknown_keys_name_the_right_one(path, meant):
  with pytest.raises(errors.UserError) as caught:
    resolve.resolve(RAW, {path: "1"})
  text = str(caught.value)
  assert path.partition(".")[0] in text and "\n" not in text
  assert meant in text.partition("did you mean ")[2]


@pytest.mark.parametrize("raw", [
    {"model": {"name": ["adm"]}}, {"method": {"name": {}}}, {"eval": {"k": []}},
    {"training": {"ema_rates": {"a": 1}}}, {"data": {"path": 3}},
    {"optimizer": {"learning_rate": "1" * 40}}, {"seed": True},
])
def test_values_of_other_types_in_a_file(raw):
  with pytest.raises(errors.UserError):
    build.build(resolve.resolve(BASE | {
        k: BASE[k] | v if isinstance(v, dict) else v for k, v in raw.items()
    }))


def test_a_network_with_classes_that_no_image_has(tmp_path):
  images = np.zeros((30, 8, 8, 1), np.uint8)
  np.savez(tmp_path / "train.npz", arr_0=images, arr_1=np.arange(30) % 3)
  asked = toys.TINY | {
      "data.name": "npz", "data.path": str(tmp_path / "train.npz"),
      "model.num_classes": "10",
  }
  with pytest.raises(errors.UserError, match="model.num_classes=3"):
    build.build(resolve.resolve(RAW, asked))
  asked["data.allow_fewer_classes"] = "true"
  assert build.build(resolve.resolve(RAW, asked)).num_classes == 10
  with pytest.raises(errors.UserError, match="model.num_classes"):
    build.build(resolve.resolve(RAW, asked | {"model.num_classes": "2"}))


ADDRESSES = ("gs://bucket/x", "s3://b/x", "http://h/x.npz", "gs:/x", "GS://x")
STRINGS = sorted(
    key for key, (hint, _) in hints().items()
    if re.search(r"\bstr\b", str(hint))
)


def test_no_key_takes_an_address():
  assert {"data.path", "training.init_from", "eval.reference",
          "sample.guidance_network", "eval.lpips_path"} <= set(STRINGS)
  for key in STRINGS:
    hint, _ = hints()[key]
    for address in ADDRESSES:
      with pytest.raises(errors.UserError, match=re.escape(key)):
        resolve._convert(address, hint, key)
  raw = resolve.read_file("configs/digits_cd.py")
  for key in ("method.teacher", "method.lpips_path"):
    with pytest.raises(errors.UserError, match=key):
      resolve.resolve(raw, {key: ADDRESSES[0]})
  # Windows' drives and names with a colon are no addresses.
  for name in ("C:/data", "tfds:mnist", "runs/gs:/x"):
    resolve._convert(name, str, "data.path")


@pytest.mark.parametrize("argv", [
    ["train", "--config=configs/digits.py", "--workdir=ADDRESS"],
    ["train", "--config=ADDRESS", "--workdir=run"],
    *([mode, "--workdir=ADDRESS"] for mode in (
        "sample", "invert", "edit", "eval", "search", "reference", "table",
        "pairs",
    )),
    ["inspect", "--config=configs/digits.py", "--workdir=ADDRESS"],
    ["inspect", "--config=configs/digits.py", "--compare=ADDRESS@3"],
    ["compile", "--config=configs/digits.py", "--out=ADDRESS"],
    ["prepare", "in", "ADDRESS"], ["prepare", "ADDRESS", "out"],
    ["prepare", "in", "out", "--data_dir=ADDRESS"],
    ["convert", "ADDRESS", "out"], ["convert", "in", "ADDRESS"],
    ["convert", "in", "ADDRESS", "--reverse"],
    ["plots", "ADDRESS"], ["plots", "run", "ADDRESS", "--out=x"],
    ["plots", "run", "--out=ADDRESS"], ["studio", "ADDRESS"],
    ["hub", "pack", "ADDRESS", "out"], ["hub", "unpack", "in", "ADDRESS"],
    ["hub", "push", "ADDRESS", "a/b"], ["hub", "pull", "a/b", "ADDRESS"],
    ["export", "ADDRESS", "out.zip"], ["export", "run", "ADDRESS"],
    ["migrate", "ADDRESS", "new"], ["migrate", "old", "ADDRESS"],
    ["train_classifier", "--config=configs/digits.py", "--out=ADDRESS"],
], ids=" ".join)
def test_no_command_takes_an_address(argv, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for address in ADDRESSES[:1] + ADDRESSES[3:4]:
    with pytest.raises(SystemExit) as done:
      commands.run([word.replace("ADDRESS", address) for word in argv])
    assert done.value.code == errors.EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert address in line
    assert not list(tmp_path.iterdir())


CONNECTED = ["inspect", "--config=configs/digits.py", "--num_processes=2"]


@pytest.mark.parametrize("argv, flag", [
    *((["prepare", "in", "out", f"--size={v}"], "size") for v in (
        0, -1, 10**9, "nan",
    )),
    (["prepare", "in", "out", "--channels=2"], "channels"),
    (["prepare", "in", "out", "--shard_mb=0"], "shard_mb"),
    *((["train_classifier", "--config=configs/digits.py", "--out=cls", f], f)
      for f in (
          "--steps=0", "--steps=-1", "--batch_size=0", "--learning_rate=nan",
          "--learning_rate=inf", "--learning_rate=-1", "--seed=-1",
          "--seed=4294967296", "--steps=99999999999",
      )),
    *(([*CONNECTED, "--process_id=0", f"--coordinator={v}"], "coordinator")
      for v in ("host", "host:0", "host:99999", ":1234", "host:port")),
    ([*CONNECTED, "--process_id=2", "--coordinator=h:1"], "process_id"),
    ([*CONNECTED, "--process_id=-1", "--coordinator=h:1"], "process_id"),
])
def test_numbers_that_no_flag_takes(argv, flag, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
  monkeypatch.setattr(jax.distributed, "initialize", None)
  if argv[0] == "prepare":
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
  with pytest.raises(SystemExit) as done:
    commands.run([a.replace("=cls", f"={tmp_path}/cls") for a in argv])
  assert done.value.code == errors.EXIT_BAD_INPUT
  (line,) = capsys.readouterr().err.splitlines()
  assert flag.lstrip("-").partition("=")[0] in line
  assert not (tmp_path / "out").exists() and not (tmp_path / "cls").exists()
