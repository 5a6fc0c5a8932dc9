"""Runs and model folders of the first version: rewritten, otherwise refused.

files/first_version.tar.gz was written by commit 542805e: `run` (tiny_run.py
with model.width=8, 4 steps), `packed` (its network in bfloat16), and
`images.npz` (what the networks sampled there).
"""

import json
import os
import pathlib
import re
import shutil
import tarfile

from etils import epath
import jax
import numpy as np
import pytest

import bcm_jax
from bcm_jax import __main__ as command
from bcm_jax import errors
from bcm_jax import train
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import digests
from bcm_jax.config import registry
from bcm_jax.config import renamed
from bcm_jax.config import resolve
from bcm_jax.editing import pretrained
from bcm_jax.evaluation import tables
from bcm_jax.export import model_folder
from bcm_jax.generate import planning
from bcm_jax.plots import records
from bcm_jax.tools import migrate
from bcm_jax.training import nonfinite
from bcm_jax.training import train_state
from tests.training import tiny_run

FILES = pathlib.Path(__file__).with_name("files")
REFUSED = (
    "written by an earlier version of bcm_jax; run bcm_jax migrate OLD NEW"
)
POWER = train_state.phema_name(0.05)


@pytest.fixture(scope="module", autouse=True)
def toy():
  before = dict(registry.MODELS)
  tiny_run.register()
  yield
  registry.MODELS.clear()
  registry.MODELS.update(before)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("first_version")
  with tarfile.open(FILES / "first_version.tar.gz") as tar:
    tar.extractall(folder, filter="data")
  return folder


@pytest.fixture(scope="module")
def images(old) -> dict[str, np.ndarray]:
  return dict(np.load(old / "images.npz"))


@pytest.fixture(scope="module")
def new(old, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("migrated")
  before = contents(old)
  for name in ("run", "packed"):
    migrate.migrate(str(old / name), str(folder / name))
  assert contents(old) == before
  return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
      str(p.relative_to(folder)): p.read_bytes()
      for p in folder.rglob("*") if p.is_file()
  }


def sample(model, latents, sampler="ancestral@0.7") -> np.ndarray:
  plan = planning.plan_of(model.experiment, sampler)
  keys = jax.random.split(jax.random.key(0), len(latents))
  labels = np.array([3, 1, 4, 1], np.int32)[: len(latents)]
  return model.runner(plan, latents, labels, keys)


def read(path: pathlib.Path):
  return json.loads(path.read_text())


# The run ---------------------------------------------------------------------


@pytest.mark.parametrize("name, average", [
    ("params", "params"), ("ema_0.9", "ema_0.9"), ("power_0.05", POWER),
    ("power_0.05", None),
])
def test_a_migrated_run_samples_the_same_images(new, images, name, average):
  model = bcm_jax.load(new / "run", average=average)
  found = sample(model, images["latents"])
  np.testing.assert_allclose(found, images[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_migrated_run_resumes_as_the_first_version_did(
    new, images, tmp_path
):
  workdir = str(shutil.copytree(new / "run", tmp_path / "run"))
  config = resolve.of_run(
      workdir, {"training.num_steps": "5", "eval.at_end": "false"}
  )
  state = train.train_and_evaluate(config, workdir)
  assert int(state.networks["student"].num_updates) == 5
  model = bcm_jax.load(workdir, average="params")
  assert checkpoint.Checkpoints(f"{workdir}/checkpoints").all_steps() == [
      2, 4, 5
  ]
  found = sample(model, images["latents"])
  np.testing.assert_allclose(found, images["resumed"], rtol=0, atol=1e-5)


def test_checkpoints_have_the_same_tensors_and_facts(old, new):
  for step in (2, 4):
    before, after = (
        checkpoint.read_step(
            epath.Path(folder / "run" / "checkpoints" / str(step)), version
        )
        for folder, version in ((old, 1), (new, digests.FORMAT))
    )
    assert len(before.leaves) == len(after.leaves)
    for path, leaf in before.leaves.items():
      path = "/".join(path)
      path = path.replace("players/", "networks/")
      path = path.replace("window", "data_offset")
      path = path.replace("/updates", "/num_updates")
      path = path.replace("power_", POWER.partition("0")[0])
      found = after.leaves[tuple(path.split("/"))]
      np.testing.assert_array_equal(found, leaf)
    assert after.meta["config"] == read(new / "run" / "config.json")
    for key in ("data_fingerprint", "frozen"):
      assert after.meta[key] == before.meta[key]


def test_every_key_of_the_config_is_known(old, new):
  found = read(new / "run" / "config.json")
  resolved = resolve.to_json(resolve.resolve(found))
  # Keys that the first version did not have take their defaults.
  assert found == {
      k: {n: resolved[k][n] for n in v} if isinstance(v, dict) else resolved[k]
      for k, v in found.items()
  }
  assert found["parallel"]["sharding"] == ["networks/.*=replicate", "replicate"]
  assert found["sample"]["average"] == POWER
  assert found["eval"]["averages"] == ["ema_0.9", POWER]
  assert found["training"]["watchdog_timeout_secs"] == 120.0
  old_config = read(old / "run" / "config.json")
  assert migrate.config(found) == found != old_config
  method = {"name": "dmd", "dm_weight": "normalised"}
  assert migrate.config({**old_config, "method": method})["method"] == {
      "name": "dmd", "dm_weight": "normalized"
  }
  critic = migrate.config({**old_config, "critic": old_config["optimizer"]})
  assert critic["auxiliary_optimizer"] == found["optimizer"]


def test_the_page_lists_the_keys():
  page = FILES.parents[2] / "docs" / "renames.md"
  rows = re.findall(r"`(\w+)\.(\w+)` \| `\1\.(\w+)` \|", page.read_text())
  assert {row for row in rows if row[0] in renamed.KEYS} == {
      (section, old, new)
      for section, table in renamed.KEYS.items()
      for old, new in table.items()
  }


def test_records_of_the_run(old, new):
  before, after = contents(old / "run"), contents(new / "run")
  lines = [
      json.loads(line) for line in after["metrics.jsonl"].splitlines()
  ]
  assert {"loss_st"} == {k for line in lines for k in line if "_s" in k} - {
      "steps_per_sec", "skipped_in_row"
  }
  assert nonfinite.rollback_history(new / "run") == [
      nonfinite.Rollback(2, 0, 3, 2, 1)
  ]
  result = read(new / "run" / "eval" / f"4_{POWER}.json")
  assert result["average"] == POWER
  (sampler,) = result["samplers"].values()
  assert {"class_accuracy", "worst_class_accuracy", "memorization_ratio"} <= (
      sampler.keys() & sampler["std"].keys() & sampler["seeds"]["0"].keys()
  )
  assert result["protocol"]["num_real_for_prdc"] == 20
  assert result["classifier_test_accuracy"] > 0
  for name in ("DONE", "goodput/0000.json", "tensorboard/events"):
    assert after[name] == before[name]


def test_results_are_read(old, new, tmp_path):
  (run,) = records.open_runs([str(new / "run")])
  assert {curve.protocol.num_real for curve in records.quality(run)} == {20}
  folder = tmp_path / "results"
  migrate.migrate(str(old / "run" / "eval"), str(folder))
  assert set(tables.read(str(folder))) == {f"4_{POWER}"}
  with pytest.raises(errors.UserError, match=REFUSED):
    tables.read(str(old / "run" / "eval"))


def test_a_damaged_checkpoint_is_named(old, tmp_path):
  run = shutil.copytree(old / "run", tmp_path / "run")
  (run / "checkpoints" / "2" / "meta" / "metadata").write_text("{}")
  with pytest.raises(errors.UserError, match="checkpoints/2 is damaged"):
    migrate.migrate(str(run), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_bad_folders(old, new, tmp_path):
  for source, target, said in (
      (old / "run", old / "run" / "new", "outside OLD"),
      (old / "run", new / "run", "exists already"),
      (tmp_path, tmp_path / ".." / "new", "has no .json files"),
      (new / "run", tmp_path / "new", "got a checkpoint of format 2"),
      (new / "packed", tmp_path / "new", "got format 2, expected 1"),
  ):
    with pytest.raises(errors.UserError, match=said):
      migrate.migrate(str(source), str(target))
    assert not (tmp_path / "new").exists()


CONFIGS = [
    "[]", "3", "null", "{}", "", "[" * 100_000, '{"method": 3}',
    '{"method": {"name": "bcm"}, "parallel": 3, "training": {"hang_secs": 1}}',
    '{"method": {}, "parallel": {"sharding": [3]}, "training":'
    ' {"hang_secs": 1}}',
    '{"training": {"num_steps": 3}}',
]


@pytest.mark.parametrize("text", CONFIGS)
def test_odd_configs_are_refused(tmp_path, text):
  (tmp_path / "old").mkdir()
  (tmp_path / "old" / "config.json").write_text(text)
  with pytest.raises(errors.UserError, match="config.json"):
    migrate.migrate(str(tmp_path / "old"), str(tmp_path / "new"))
  assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_migrating_twice_or_into_itself_is_refused(old, new, tmp_path):
  shutil.copytree(new / "run", tmp_path / "run")
  shutil.copytree(new / "run", tmp_path / "no_steps")
  shutil.rmtree(tmp_path / "no_steps" / "checkpoints")
  for name in ("run", "no_steps"):
    before = contents(tmp_path)
    with pytest.raises(errors.UserError, match=name):
      migrate.migrate(str(tmp_path / name), str(tmp_path / "again"))
    assert contents(tmp_path) == before
  before = contents(old)
  for place in ("run", "run/new"):
    with pytest.raises(errors.UserError):
      migrate.migrate(str(old / "run"), str(old / place))
  assert contents(old) == before


@pytest.mark.parametrize("make", [
    lambda folder: (folder / "self").symlink_to(folder),
    lambda folder: (folder / "self").symlink_to("self"),
    lambda folder: (folder / "gone.json").symlink_to("nowhere"),
    lambda folder: os.mkfifo(folder / "pipe.json"),
])
def test_odd_files_are_named(old, tmp_path, make):
  shutil.copytree(old / "run", tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  make(tmp_path / "run")
  with pytest.raises(errors.UserError, match="self|gone|pipe"):
    migrate.migrate(str(tmp_path / "run"), str(tmp_path / "new"))


def test_digests_of_frozen_networks_stay():
  tree = {"a": {"b": np.arange(3, dtype=np.float32)}, "c": {}}
  assert digests.tree_digest(tree) == "ade94a082d09"


# Model folders ---------------------------------------------------------------


def test_a_model_folder_has_the_same_tensors(old, new):
  _, before, facts = model_folder.read(str(old / "packed"), migrate.FORMAT)
  config, after, metadata = model_folder.read(str(new / "packed"))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  kept = ("step", "average", "data", "image_shape", "dtype", "tensors_digest")
  assert {k: metadata[k] for k in kept} == {k: facts[k] for k in kept}
  assert metadata["dtype"] == "bfloat16"
  assert config == read(new / "run" / "config.json")
  assert 'license: "mit"' in (new / "packed" / "README.md").read_text()
  model_folder.load(str(new / "packed"))


def test_the_shipped_network_samples_the_same_image(images):
  found = sample(bcm_jax.load(), images["latents"][:1], "onestep")
  np.testing.assert_allclose(found, images["shipped"], rtol=0, atol=1e-5)


def test_the_shipped_network_is_complete():
  config, _, metadata = model_folder.read(str(pretrained.SHIPPED))
  card = (pathlib.Path(pretrained.SHIPPED) / "README.md").read_text()
  assert metadata["config_digest"] in card
  assert "recognised" not in card
  assert config == migrate.config(config)


# Refusals --------------------------------------------------------------------


COMMANDS = {
    "sample": "sample --workdir=OLD/run",
    "train": "train --config=TINY --workdir=OLD/run",
    "eval": "eval --workdir=OLD/run",
    "invert": "invert --workdir=OLD/run",
    "edit": "edit --workdir=OLD/run",
    "search": "search --workdir=OLD/run",
    "inspect": "inspect --workdir=OLD/run",
    "compare": "inspect --workdir=NEW/run --compare=OLD/run",
    "init_from": "train --config=TINY --workdir=TMP/run "
                 "--config.training.init_from=OLD/run",
    "teacher": "train --config=configs/digits_cd.py --workdir=TMP/run "
               "--config.method.teacher=OLD/run",
    "baseline": "eval --workdir=NEW/run "
                "--config.eval.inversion_baseline=OLD/run",
    "pack": "hub pack OLD/run TMP/packed",
    "unpack": "hub unpack OLD/packed TMP/run",
    "export": "export OLD/run TMP/out.zip",
    "to_file": "convert OLD/run TMP/out.safetensors --reverse",
    "plots": "plots OLD/run --out=TMP/out",
    "result": "plots OLD/run/eval/4_power_0.05.json --out=TMP/out",
    "studio": "studio OLD/run",
    "studio_packed": "studio OLD/packed",
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if "studio" in name else name
    for name in COMMANDS  # To import Gradio takes seconds.
])
def test_old_folders_are_refused(name, old, new, tmp_path, capsys):
  words = COMMANDS[name].replace("OLD", str(old)).replace("NEW", str(new))
  words = words.replace("TMP", str(tmp_path)).replace("TINY", tiny_run.__file__)
  with pytest.raises(SystemExit) as stopped:
    command.run(words.split())
  assert stopped.value.code == errors.EXIT_BAD_INPUT
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith("error: ") and line.endswith(REFUSED), line
  assert str(old) in line
  written = [p for p in tmp_path.rglob("*") if p.name == "checkpoints"]
  assert not written
