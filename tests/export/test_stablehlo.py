"""Exported samplers: those of the library, alone, checked and whole."""

import ast
import hashlib
import io
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import zipfile

import jax
from jax import export as jax_export
import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax import sample
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.export import stablehlo
from bcm_jax.export import stablehlo_runtime
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.sampling import samplers
from tests import toys

TINY = {
    **toys.TINY,
    "model.num_res_blocks": "1",  # Else its images are nearly grey.
    "sample.num_samples": "5", "sample.batch_size": "4",
    "invert.nfe": "2", "invert.seed": "3", "training.ema_rates": "()",
}
SAMPLERS = ("onestep", "cm_multistep@9/2.5")


def make_run(folder, file="digits.py", **overrides):
  """A run of random weights and of two averages that differ."""
  values = TINY | {k.replace("__", "."): v for k, v in overrides.items()}
  config = resolve.resolve(resolve.read_file(file), values)
  built = build.build(config, to_train=False)
  resolve.write(config, str(folder))
  shapes = jax.eval_shape(
      built.method.init, jax.random.key(0), *build.example_batch(built)
  )
  draw = np.random.default_rng(0).standard_normal

  def moved():
    return jax.tree.map(
        lambda x: np.asarray(0.3 * draw(x.shape), np.float32), shapes
    )

  with checkpoint.Checkpoints(runs.checkpoint_dir(str(folder))) as saved:
    saved.save(8, {
        "networks": {built.method.sampled_network: {"params": moved()}},
        "averages": {"ema_0.9": moved(), "ema_0.5": moved()},
    }, {})
  return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
  """All that a run's network can, for all platforms, by the command."""
  out = tmp_path_factory.mktemp("out") / "digits.zip"
  stablehlo.main([str(run), str(out), f"--samplers={','.join(SAMPLERS)}",
               "--invert"])
  return out


@pytest.fixture(scope="module")
def model(path):
  return stablehlo_runtime.load(path)


def open_run(run, average=None, overrides=None):
  """(experiment, runner) of a run, as the modes make them."""
  built = build.build(
      resolve.of_existing_run(str(run), overrides), to_train=False
  )
  _, _, params = runs.load_run(built, str(run), average)
  return built, batched_sampler.BatchedSampler(built, params, 4)


@pytest.fixture(scope="module")
def library(run):
  return open_run(run)


def samples(library, sampler, index, seed, labels=None):
  """What the library draws; labels of all images from number 0 on."""
  plan = planning.plan_of(library[0], sampler)
  index = np.asarray(index)
  return batched_sampler.generate(*library, plan, labels, index, seed)


def assert_within_a_grey_level(images, expected):
  assert images.dtype == expected.dtype == np.uint8
  assert images.shape == expected.shape
  assert np.std(expected) > 20  # Nothing that is grey everywhere.
  difference = np.abs(images.astype(int) - expected)
  assert difference.max() <= 1 and difference.mean() < 0.01


# The same images ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_the_library(library, model, sampler):
  for index, seed in (([3], 2**32 - 1), ([4, 0, 6, 1, 9], 7)):
    labels = np.arange(10, dtype=np.int32)[::-1]
    expected = samples(library, sampler, index, seed, labels)
    got = model.sample(index, seed, labels[index], sampler)
    assert_within_a_grey_level(got, expected)


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(path, model):
  parts = stablehlo_runtime.load(path, batch_size=5)
  images = parts.sample(7, seed=1, sampler=SAMPLERS[1])
  assert len(images) == 7
  for index in ([0, 1, 2, 3, 4], [5, 0, 6, 0, 2]):
    again = model.sample(index, seed=1, sampler=SAMPLERS[1])
    assert_within_a_grey_level(images[index], again)


def test_samples_are_those_of_mode_sample(library, model, tmp_path):
  folder = sample.sample(library[0], str(tmp_path), library[1])
  with np.load(os.path.join(folder, "samples.npz")) as file:
    assert_within_a_grey_level(model.sample(5), file["arr_0"])
    only = model.sample(5, labels=int(file["arr_1"][2]))
    assert_within_a_grey_level(only[2:3], file["arr_0"][2:3])
    assert np.any(only[3] != file["arr_0"][3])


@pytest.mark.slow
def test_inversion_is_that_of_the_library(library, model):
  built, runner = library
  draw = np.random.default_rng(1).integers
  batch = {
    "image": draw(0, 256, (5, 8, 8, 1), np.uint8),
    "label": np.array([3, 1, 4, 1, 5], np.int32),
  }
  plan = planning.inversion_plan(built)
  assert plan.nfe == model.inversion["nfe"] == 2
  latents, images = batched_sampler.invert_and_reconstruct(
    built, runner, plan, batch, seed=3
  )
  found = model.invert(batch["image"], batch["label"], seed=3)
  assert found.dtype == np.float32
  toys.assert_close(found, latents, rtol=1e-5)
  assert_within_a_grey_level(model.decode(latents, batch["label"]), images)
  other = model.invert(batch["image"], batch["label"], seed=4)
  assert np.abs(other - found).max() > 0.01


@pytest.mark.slow
def test_a_network_without_classes_and_with_one_time(tmp_path):
  run = make_run(tmp_path / "run", "digits_ict.py", model__num_classes="none")
  out = tmp_path / "ict.zip"
  stablehlo.write(str(run), str(out), platforms=["cpu"])
  model = stablehlo_runtime.load(out)
  assert list(model.samplers) == ["onestep"] and model.num_classes is None
  expected = samples(open_run(run), "onestep", range(3), 1)
  assert_within_a_grey_level(model.sample(3, seed=1), expected)
  with pytest.raises(stablehlo_runtime.InputError, match="label|class"):
    model.sample(3, labels=1)
  with pytest.raises(errors.UserError, match="two_time"):
    stablehlo.write(str(run), str(tmp_path / "no.zip"), invert=True)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
  return make_run(
    tmp_path_factory.mktemp("edm"),
    "digits_edm.py",
    method__label_dropout="0.2",
    sample__num_levels="5",
  )


@pytest.mark.slow
def test_long_plans_are_loops_that_draw_the_same(
  denoiser, tmp_path, monkeypatch
):
  monkeypatch.setattr(samplers, "UNROLLED", 4)
  out = tmp_path / "edm.zip"
  # Of levels 40, 10.2, 1.6, 0.11 and 0.002: guided, plain, with noise, with
  # noise, plain.
  overrides = {
    "sample.sampler": "ddim",
    "sample.s_churn": "2",
    "sample.s_tmin": "0.1",
    "sample.s_tmax": "9.",
    "sample.guidance": "3.0",
    "sample.guidance_interval": "(20.,50.)",
  }
  flags = [f"--config.{k}={v}" for k, v in overrides.items()]
  stablehlo.main([str(denoiser), str(out), "--platforms=cpu", *flags])
  model, library = (
    stablehlo_runtime.load(out),
    open_run(denoiser, None, overrides),
  )
  plan = planning.plan_of(library[0])
  assert (plan.nfe, plan.guide_nfe) == (5, 1)
  assert [len(turns) for turns in samplers.alike(plan)] == [1, 1, 2, 1]
  expected = samples(library, None, range(3), 1, np.arange(3))
  assert_within_a_grey_level(model.sample(3, seed=1), expected)
  (name,) = model.samplers
  assert name == "ddim" and model.samplers[name]["nfe"] == 5


@pytest.mark.slow
def test_an_average_and_a_guide_of_another_go_along(denoiser, tmp_path):
  run, out = tmp_path / "run", tmp_path / "guided.zip"
  shutil.copytree(denoiser, run)
  guided = {
    "sample.sampler": "ddim",
    "sample.num_levels": "2",
    "sample.guidance": "2.0",
    "sample.guidance_network": str(denoiser),
  }
  flags = [f"--config.{k}={v}" for k, v in guided.items()]
  stablehlo.main(
    [
      str(run),
      str(out),
      "--platforms=cpu",
      "--average=ema_0.5",
      "--step=8",
      *flags,
    ]
  )
  library = open_run(run, "ema_0.5", guided)
  expected = samples(library, None, range(3), 1, np.arange(3))
  model = stablehlo_runtime.load(out)
  assert model.manifest["average"] == "ema_0.5"
  assert_within_a_grey_level(model.sample(3, seed=1), expected)
  paths = {name.split("/")[0] for name in model._weights}
  assert paths == {"network", "guide"}


# The file -------------------------------------------------------------------


def members(path):
  with zipfile.ZipFile(path) as file:
    return {name: file.read(name) for name in file.namelist()}


def test_the_file_explains_itself(library, path, model):
  contents = members(path)
  manifest = json.loads(contents["manifest.json"])
  built, _ = library
  assert manifest["config_digest"] == resolve.digest(built.config)
  assert manifest["versions"]["jax"] == jax.__version__
  assert (manifest["step"], manifest["data"]) == (8, "digits")
  assert manifest["average"] == "ema_0.9"
  assert manifest["image_shape"] == [8, 8, 1] and manifest["num_classes"] == 10
  for name in SAMPLERS:
    plan = planning.plan_of(built, name)
    entry = model.samplers[name]
    assert (entry["plan"], entry["nfe"]) == (str(plan), plan.nfe)
    assert len(entry["steps"]) == len(plan.steps)
  steps = model.samplers[SAMPLERS[1]]["steps"]
  assert [step["kind"] for step in steps] == ["Jump", "AddNoise"] * 2 + ["Jump"]
  assert steps[1]["level"] == steps[2]["t"] == 9
  for name, digest in manifest["files"].items():
    assert hashlib.sha256(contents[name]).hexdigest() == digest
  assert set(contents) == {"manifest.json", *manifest["files"]}
  loader = pathlib.Path(stablehlo_runtime.__file__).read_bytes()
  assert contents["exported.py"] == loader


def assert_portable(program):
  """Nothing is one vendor's, such as fused attention or threefry kernels."""
  text = program.mlir_module()
  assert text.count("custom_call") == text.count("custom_call @shape_assert")


def test_programs_are_for_all_platforms_and_any_batch(path, model):
  assert model.platforms == ("cpu", "cuda", "tpu")
  entries = [*model.samplers.values(), model.inversion]
  for entry in [*entries, model.manifest["decode"]]:
    program = jax_export.deserialize(bytearray(members(path)[entry["file"]]))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert (
      program.calling_convention_version
      == (model.manifest["calling_convention_version"])
    )
    (out,) = program.out_avals
    assert str(out.shape) == "(b, 8, 8, 1)"
    assert_portable(program)


NETWORKS = {
  "adm": {"model.dtype": "bfloat16", "model.num_groups": "4"},
  "dhariwal": {"model.dtype": "float16"},
  "ddpmpp": {},
  "ncsnpp": {},
  "edm2": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.MODELS)
def test_every_network_is_lowered_for_all_platforms(name):
  values = {
    "model.name": name,
    "model.model_channels": "32",
    "model.channel_mult": "1,2",
    "model.attention_resolutions": "8,",
    "model.num_res_blocks": "1",
    "model.num_classes": "10",
    "data.name": "none",
    "data.image_shape": "(16,16,3)",
    "data.num_classes": "10",
  }
  config = resolve.resolve({"method": {"name": "edm"}}, values | NETWORKS[name])
  built = build.build(config, to_train=False)
  weights = stablehlo.to_weights(
    jax.eval_shape(
      built.method.init, jax.random.key(0), *build.example_batch(built)
    )
  )
  plan = planning.plan_of(built, "ddim:2")
  program = jax_export.deserialize(
    bytearray(
      stablehlo.serialize(
        stablehlo.sampler(built, None, plan),
        stablehlo.specs(built, weights),
        stablehlo.PLATFORMS,
      )
    )
  )
  assert program.platforms == stablehlo.PLATFORMS
  assert str(program.out_avals[0].shape) == "(b, 16, 16, 3)"
  assert_portable(program)


# The shapes of all arguments, on a chip that is not there.
FOR_A_TPU = """
import sys, jax, numpy as np
from jax import export
from jax.experimental import topologies
import exported
model = exported.load(sys.argv[1])
entry = model.samplers["onestep"]
chip = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2").devices[0]
place = jax.sharding.SingleDeviceSharding(chip)
rows = np.zeros(8, np.int32)
given = {"weights": model._weights, "seed": np.uint32(0), "index": rows,
         "labels": rows}
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    [given[name] for name in entry["arguments"]])
program = export.deserialize(bytearray(model._contents[entry["file"]]))
compiled = jax.jit(program.call).lower(*shapes).compile()
print("compiled:", chip.device_kind, compiled.out_info.shape)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  (sys.platform, platform.machine()) != ("linux", "x86_64"),
  reason="libtpu's wheels are for Linux on x86-64 alone",
)
def test_the_compiler_of_tpus_takes_a_program(path, tmp_path):
  settings = {
    "PYTHONPATH": str(path),
    "TPU_SKIP_MDS_QUERY": "1",
    "XLA_FLAGS": "",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
  }
  done = subprocess.run(
    [sys.executable, "-c", FOR_A_TPU, str(path)],
    cwd=tmp_path,
    env=os.environ | settings,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "compiled: TPU v5 lite (8, 8, 8, 1)" in done.stdout


def test_programs_hold_no_weights_and_no_paths(path):
  contents = members(path)
  programs = {k: v for k, v in contents.items() if k.endswith(".bin")}
  assert len(programs) == len(SAMPLERS) + 2
  with np.load(io.BytesIO(contents["weights.npz"])) as file:
    count = sum(file[name].size for name in file.files)
  for content in programs.values():
    text = jax_export.deserialize(bytearray(content)).mlir_module()
    assert ".py" not in text and str(pathlib.Path.cwd()) not in text
    assert len(content) < 4 * count * 10
    assert b"bcm_jax" not in content


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(run, tmp_path):
  for name in ("a.zip", "b.zip"):
    stablehlo.write(str(run), str(tmp_path / name), platforms=["cpu"])
  a, b = ((tmp_path / n).read_bytes() for n in ("a.zip", "b.zip"))
  assert a == b


def test_any_damage_is_noticed(path, tmp_path):
  good = path.read_bytes()
  whole = stablehlo_runtime.load(path)
  copy, found = tmp_path / "copy.zip", 0
  for at in np.random.default_rng(0).integers(0, len(good), 120):
    copy.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
    try:
      model = stablehlo_runtime.load(copy)
    except stablehlo_runtime.DamagedError as e:
      assert str(copy) in str(e)
      found += 1
    else:  # In a field that nobody reads, such as a date.
      assert model.manifest == whole.manifest
  assert found > 110
  for cut in (0, 1, len(good) // 2, len(good) - 1):
    copy.write_bytes(good[:cut])
    with pytest.raises(stablehlo_runtime.DamagedError):
      stablehlo_runtime.load(copy)


def repack(path, out, name, content):
  """A copy with other content of a member, in an archive that is sound."""
  with zipfile.ZipFile(out, "w") as file:
    for each, old in members(path).items():
      file.writestr(each, content if each == name else old)
  return out


def rewrite(path, out, **changes):
  """A copy with another manifest and a digest that fits it."""
  manifest = json.loads(members(path)["manifest.json"]) | changes
  manifest["sha256"] = stablehlo_runtime.record_digest(manifest)
  return repack(path, out, "manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
  "changes, error, said",
  [
    ({"format": 2}, stablehlo_runtime.VersionError, "exported.py inside"),
    ({"calling_convention_version": 99}, stablehlo_runtime.VersionError, "99"),
    (
      {"platforms": ["tpu"]},
      stablehlo_runtime.PlatformError,
      "tpu",
    ),
  ],
)
def test_files_that_cannot_be_used_here(path, tmp_path, changes, error, said):
  with pytest.raises(error, match=said):
    stablehlo_runtime.load(rewrite(path, tmp_path / "other.zip", **changes))


@pytest.mark.parametrize(
  "name, old, new",
  [
    ("manifest.json", b'"digits"', b'"images"'),
    ("weights.npz", b"kernel.npy", b"kennel.npy"),
    ("exported.py", b"jax", b"fax"),
  ],
)
def test_members_that_were_edited(path, tmp_path, name, old, new):
  content = members(path)[name]
  assert old in content
  edited = repack(path, tmp_path / "a.zip", name, content.replace(old, new))
  with pytest.raises(stablehlo_runtime.DamagedError, match=name):
    stablehlo_runtime.load(edited)


def test_a_program_that_this_jax_cannot_read(path, tmp_path):
  model = stablehlo_runtime.load(path)
  model._contents[model.samplers["onestep"]["file"]] = b"of another time" * 9
  with pytest.raises(stablehlo_runtime.VersionError, match="jax"):
    model.sample(1)


def test_a_program_for_other_devices_alone(run, tmp_path):
  out = tmp_path / "gpu.zip"
  stablehlo.main([str(run), str(out), "--platforms=cuda,rocm"])
  with pytest.raises(
    stablehlo_runtime.PlatformError, match="cuda.*cpu"
  ):
    stablehlo_runtime.load(out)


# Bad input ------------------------------------------------------------------

IMAGES = np.zeros((2, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda m: m.sample(0), "0"),
    (lambda m: m.sample(2.5), "2.5"),
    (lambda m: m.sample([[1]]), "seed|number"),
    (lambda m: m.sample([-1]), "0 to 2147483647"),
    (lambda m: m.sample(1, seed=-1), "seed.*-1.* 4294967295"),
    (lambda m: m.sample(1, seed=2**32), "4294967296"),
    (lambda m: m.sample(2, labels=10), "10.* 0 to 9"),
    (lambda m: m.sample(2, labels=[0, -1]), "-1.* 0 to 9"),
    (lambda m: m.sample(2, labels=[0, 1, 2]), "label.*2"),
    (lambda m: m.sample(2, labels=0.5), "float64"),
    (lambda m: m.sample(2, sampler="heun"), "heun.*onestep, cm_multistep"),
    (lambda m: m.invert(IMAGES), "labels"),
    (lambda m: m.invert(IMAGES / 255, 0), "float64.*uint8"),
    (lambda m: m.invert(IMAGES[0], 0), r"\[n, 8, 8, 1\]"),
    (lambda m: m.invert(IMAGES[:, :4], 0), r"\[2, 4, 8, 1\]"),
    (lambda m: m.invert(IMAGES[:0], 0), "0"),
    (lambda m: m.decode(IMAGES, 0), "float32"),
    (lambda m: m.decode(np.float32(IMAGES), 99), "99.* 0 to 9"),
  ],
)
def test_arguments_that_do_not_fit(model, call, said):
  with pytest.raises(stablehlo_runtime.InputError, match=said):
    call(model)


def test_a_batch_size_of_nothing(path):
  with pytest.raises(stablehlo_runtime.InputError, match="batch_size"):
    stablehlo_runtime.load(path, batch_size=0)


def test_inversion_that_was_not_exported(run, tmp_path):
  stablehlo.write(str(run), str(tmp_path / "a.zip"), platforms=["cpu"])
  model = stablehlo_runtime.load(tmp_path / "a.zip")
  for call in (lambda: model.invert(IMAGES, 0), lambda: model.decode(0, 0)):
    with pytest.raises(
      stablehlo_runtime.InputError, match="--invert"
    ):
      call()


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--samplers=onestpe"], "'onestep'"),
    (["--samplers=ancestral@900"], "900"),
    (["--samplers=heun"], "heun"),
    (["--platforms=gpu"], "cuda"),
    (["--platforms=cpu,cpu"], "--platforms"),
    (["--platforms="], "--platforms"),
    (["--average=ema_7"], "sample.average"),
    (["--step=5"], "5"),
    (["--step=x"], "--step"),
    (["--config.sample.rejection=0.5"], "sample.rejection"),
    (["--config.model.attention=cudnn"], "cudnn"),
    (["--config.sample.smapler=onestep"], "smapler"),
    (["--config=configs/digits.py"], "--config"),
    (["--half"], "--half"),
  ],
)
def test_the_command_refuses(run, tmp_path, capsys, flags, said):
  with pytest.raises(SystemExit) as done:
    stablehlo.main([str(run), str(tmp_path / "out" / "a.zip"), *flags])
  assert done.value.code == errors.EXIT_BAD_INPUT
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and said in line
  assert not list(tmp_path.iterdir())


def test_the_command_says_what_to_install(run, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  with pytest.raises(errors.UserError, match=r"pip install 'bcm_jax\[export"):
    stablehlo.write(str(run), str(tmp_path / "a.zip"))


def test_places_that_cannot_be_written(run, path, tmp_path):
  before = path.read_bytes()
  (tmp_path / "file").write_text("")
  for workdir, out, said in (
    (run, path, str(path)),
    (tmp_path, tmp_path / "a.zip", str(tmp_path)),
    (run, tmp_path / "file" / "a.zip", "file/a.zip"),
  ):
    with pytest.raises(errors.UserError, match=said):
      stablehlo.write(str(workdir), str(out), platforms=["cpu"])
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
  original, calls = stablehlo.serialize, []

  def fails_at_the_second(*args):
    calls.append(original(*args))
    if len(calls) == 2:
      raise RuntimeError("no more")
    return calls[-1]

  monkeypatch.setattr(stablehlo, "serialize", fails_at_the_second)
  with pytest.raises(RuntimeError, match="no more"):
    stablehlo.write(
      str(run), str(tmp_path / "a.zip"), SAMPLERS[:2], platforms=["cpu"]
    )
  assert not list(tmp_path.iterdir())
  assert jax.config.jax_traceback_in_locations_limit > 0


# Alone ----------------------------------------------------------------------

# Makes all but the loader's own needs look like what is not installed.
ALONE = """
import sys
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {absent!r}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import exported, numpy as np
assert "digits.zip" in exported.__file__, exported.__file__
model = exported.load({path!r})
images = model.sample(5, seed=7, sampler={sampler!r})
latents = model.invert(images, labels=2, seed=3)
np.savez({out!r}, images=images, latents=latents,
         decoded=model.decode(latents, labels=2))
print(sorted({{name.split(".")[0] for name in sys.modules}}))
"""
ABSENT = (
  "bcm_jax",
  "flax",
  "optax",
  "orbax",
  "ml_collections",
  "tensorflow",
  "clu",
  "absl",
  "grain",
  "sklearn",
  "PIL",
  "etils",
  "chex",
)


@pytest.mark.slow
def test_the_loader_needs_jax_and_flatbuffers_alone(path, model, tmp_path):
  code = ALONE.format(
    absent=set(ABSENT),
    path=str(path),
    out=str(tmp_path / "out.npz"),
    sampler=SAMPLERS[1],
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"PYTHONPATH": str(path)},
  )
  assert done.returncode == 0, done.stderr
  loaded = ast.literal_eval(done.stdout.splitlines()[-1])
  assert {"jax", "flatbuffers", "exported"} <= set(loaded)
  assert not set(ABSENT) & set(loaded)
  images = model.sample(5, seed=7, sampler=SAMPLERS[1])
  with np.load(tmp_path / "out.npz") as found:
    assert_within_a_grey_level(found["images"], images)
    latents = model.invert(found["images"], labels=2, seed=3)
    toys.assert_close(found["latents"], latents, rtol=1e-5)
    assert_within_a_grey_level(
      found["decoded"], model.decode(found["latents"], labels=2)
    )


def test_the_loader_imports_jax_numpy_and_python_alone():
  tree = ast.parse(pathlib.Path(stablehlo_runtime.__file__).read_text())
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add("." * node.level + (node.module or ""))
  tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
  assert tops == {"jax", "numpy"}


def test_the_page_names_every_flag_and_call():
  page = pathlib.Path(__file__).parents[2] / "docs" / "export.md"
  text = " ".join(page.read_text(encoding="utf-8").split())
  source = pathlib.Path(stablehlo.__file__).read_text(encoding="utf-8")
  flags = {
    node.args[0].value
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Call)
    and node.args
    and ast.unparse(node.func) == "parser.add_argument"
  }
  assert len(flags) == 7
  for word in [*flags - {"workdir", "out"}, "WORKDIR", "OUT.zip"]:
    assert word in text, word
  public = [n for n in vars(stablehlo_runtime.Model) if not n.startswith("_")]
  kinds = [n for n in vars(stablehlo_runtime) if n.endswith("Error")]
  assert len(public) == 3 and len(kinds) == 5
  for word in [*public, *kinds, f"more than {samplers.UNROLLED} evaluations"]:
    assert word in text, word


def npz(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


@pytest.mark.parametrize("weights, changes", [
  (None, {"platforms": 3}),
  (None, {"platforms": []}),
  (None, {"image_shape": None}),
  (None, {"image_shape": [8, 8, -1]}),
  (None, {"num_classes": "ten"}),
  (None, {"invert": ...}),
  (None, {"invert": {"file": "absent.bin", "arguments": []}}),
  (None, {"samplers": {}}),
  (None, {"samplers": {"onestep": []}}),
  (None, {"versions": None}),
  (None, {"calling_convention_version": "9"}),
  (None, {"files": {}}),
  (npz(a=np.array([1, "x"], dtype=object)), {}),
  (npz(a=np.float32([np.nan])), {}),
  (b"PK\x03\x04x", {}),
  (b"", {}),
])
def test_edited_files_with_fitting_digests(weights, changes, tmp_path):
  content = npz(a=np.zeros(2, np.float32)) if weights is None else weights
  manifest = {
    "format": 1, "platforms": ["cpu"], "image_shape": [8, 8, 1],
    "files": {"weights.npz": hashlib.sha256(content).hexdigest()},
    "num_classes": 10, "invert": None, "decode": None,
    "samplers": {"onestep": {"file": "weights.npz", "arguments": ["seed"]}},
    "versions": {"jax": "x"}, "calling_convention_version":
    jax_export.maximum_supported_calling_convention_version,
  } | changes
  manifest = {k: v for k, v in manifest.items() if v is not ...}
  manifest["sha256"] = stablehlo_runtime.record_digest(manifest)
  path = tmp_path / "x.zip"
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("manifest.json", json.dumps(manifest))
    file.writestr("weights.npz", content)
  with pytest.raises(stablehlo_runtime.DamagedError):
    stablehlo_runtime.load(path)
