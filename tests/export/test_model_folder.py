"""The folder in which a network is given away: what is written is read back."""

import json
import os
import re
import struct
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.export import model_card
from bcm_jax.export import model_folder
from bcm_jax.interop import weight_files
from bcm_jax.utils import hashing
from tests import toys
from tests.interop import craft

CONFIG = resolve.to_json(
    resolve.resolve(resolve.read_file("digits.py"))
)
ABOUT = {
    "step": 1900, "average": "ema_0.999", "data": "digits",
    "image_shape": (8, 8, 1),
}
RESULT = {
    "step": 1900, "average": "ema_0.999",
    "samplers": {
        "onestep_nfe1": {
            "plan": ["onestep"], "nfe": 1, "KID": 0.000648305406783396,
            "FD (raw pixels)": 0.10337547460476232, "memorization_ratio": None,
            "std": {"KID": 1.3e-5, "FD (raw pixels)": None},
            "seeds": {"0": {"KID": 1.0}},
        },
        "ancestral_nfe2": {
            "plan": ["ancestral"], "nfe": 2, "KID": 0.000448877,
            "FD (raw pixels)": 0.07063960384780862, "std": {}, "seeds": {},
        },
    },
    "inversion": {"nfe1": {"nfe": 1, "noise": 0.07, "mse": 0.0123456}},
    "likelihood": {"images": 20, "bits_per_dim": 3.14159, "legacy": False},
    "protocol": {
        "samples": 1000, "seeds": [0, 1], "few_samples": "1000 of 50000",
        "features": "raw pixels", "reference": "digits/train: 1437 images",
        "commit": "abc", "hardware": "2 x cpu",
    },
    "training": {"images": 121600, "seconds": 431.7},
}


def tree(seed=0):
  """Nested parameters of several shapes; one has no dimension."""
  draw = np.random.default_rng(seed).standard_normal
  return {
      "conv": {"kernel": np.float32(draw((3, 3, 2, 5))),
               "bias": np.float32(draw(5))},
      "deep": {"block_0": {"norm": {"scale": np.float32(draw(7))}}},
      "gain": np.array(draw(), np.float32),
  }


def written(folder, **options):
  model_folder.write(str(folder), CONFIG, tree(), ABOUT, **options)
  return folder


def fails(folder):
  """The one line that reading a folder ends with."""
  with pytest.raises(errors.UserError) as caught:
    model_folder.read(str(folder))
    model_folder.read_result(str(folder))
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_what_is_written_is_read_back(tmp_path):
  folder = written(tmp_path / "a", result=RESULT)
  config, params, metadata = model_folder.read(str(folder))
  assert config == CONFIG
  toys.assert_equal(params, tree())
  assert {k: metadata[k] for k in ("step", "average", "data")} == {
      k: ABOUT[k] for k in ("step", "average", "data")
  }
  assert metadata["image_shape"] == [8, 8, 1]
  assert metadata["format"] == model_folder.FORMAT
  assert metadata["config_digest"] == resolve.digest(resolve.resolve(config))
  assert model_folder.read_result(str(folder)) == RESULT
  assert sorted(os.listdir(folder)) == sorted(model_folder.FILES)
  assert sorted(os.listdir(tmp_path)) == ["a"]
  # What is read can be written to.
  params["conv"]["bias"] += 1


def test_a_result_is_optional(tmp_path):
  folder = written(tmp_path / "a")
  assert model_folder.read_result(str(folder)) is None
  assert model_folder.RESULT not in os.listdir(folder)


@pytest.mark.parametrize("dtype, epsilon", [
    ("bfloat16", 2.0**-8), ("float16", 2.0**-11),
])
def test_smaller_dtypes_round_to_nearest(tmp_path, dtype, epsilon):
  folder = written(tmp_path / "a", dtype=dtype)
  _, params, metadata = model_folder.read(str(folder))
  assert metadata["dtype"] == dtype
  stored = weight_files.read(str(folder / model_folder.WEIGHTS)).groups[""]
  assert {v.dtype for v in stored.values()} == {model_folder.DTYPES[dtype]}
  for name, value in (("kernel", params["conv"]["kernel"]),
                      ("bias", params["conv"]["bias"])):
    exact = tree()["conv"][name]
    assert value.dtype == np.float32
    error = np.abs(value - exact) / np.abs(exact)
    assert 0 < error.max() <= epsilon, name
  # What the dtype holds exactly comes back exactly.
  again = model_folder.write(
      str(tmp_path / "b"), CONFIG, params, ABOUT, dtype=dtype
  )
  assert again is None
  toys.assert_equal(model_folder.read(str(tmp_path / "b"))[1], params)


@pytest.mark.parametrize("dtype, width", [
    ("float32", 4), ("bfloat16", 2), ("float16", 2)
])
def test_size_is_that_of_the_values_and_a_small_header(tmp_path, dtype, width):
  path = written(tmp_path / "a", dtype=dtype) / model_folder.WEIGHTS
  count = 3 * 3 * 2 * 5 + 5 + 7 + 1
  (header,) = struct.unpack("<Q", path.read_bytes()[:8])
  assert path.stat().st_size == 8 + header + count * width
  assert header < 1500


def test_the_same_weights_give_the_same_bytes(tmp_path):
  folders = [written(tmp_path / name, result=RESULT) for name in "ab"]
  for name in model_folder.FILES:
    first, second = ((folder / name).read_bytes() for folder in folders)
    assert first == second, name


def test_other_programs_find_the_tensors(tmp_path):
  path = written(tmp_path / "a") / model_folder.WEIGHTS
  found = safetensors.numpy.load_file(path)
  assert set(found) == {
      "conv.kernel", "conv.bias", "deep.block_0.norm.scale", "gain"
  }
  np.testing.assert_array_equal(found["conv.bias"], tree()["conv"]["bias"])


# Refusals ------------------------------------------------------------------


def rewrite(folder, change=None, tensors=None, **metadata):
  """Writes the weights of a folder again, otherwise."""
  path = folder / model_folder.WEIGHTS
  file = weight_files.read(str(path))
  found = json.loads(file.metadata["bcm_jax"]) | metadata
  values = dict(file.groups[""]) if tensors is None else tensors
  if change:
    change(values)
  path.write_bytes(safetensors.numpy.save(values, {
      "bcm_jax": json.dumps({k: v for k, v in found.items() if v is not None})
  }))


@pytest.mark.parametrize("missing, said", [
    ([model_folder.WEIGHTS], "model.safetensors"),
    ([model_folder.CONFIG], "config.json"),
    ([model_folder.WEIGHTS, model_folder.CONFIG],
     "config.json"),
])
def test_missing_files(tmp_path, missing, said):
  folder = written(tmp_path / "a")
  for name in missing:
    (folder / name).unlink()
  assert said in fails(folder)
  assert "hub pack" in fails(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_weights_cut_short(tmp_path, cut):
  path = written(tmp_path / "a") / model_folder.WEIGHTS
  path.write_bytes(path.read_bytes()[:cut])
  assert str(path) in fails(tmp_path / "a")


def test_a_flipped_bit_is_noticed(tmp_path):
  path = written(tmp_path / "a") / model_folder.WEIGHTS
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)
  assert "digest" in fails(tmp_path / "a")


def test_values_under_another_name_are_noticed(tmp_path):
  folder = written(tmp_path / "a")
  rewrite(folder, lambda t: t.update({"conv.b": t.pop("conv.bias")}))
  assert "digest" in fails(folder)


@pytest.mark.parametrize("metadata, said", [
    ({"format": model_folder.FORMAT + 1}, "pip install -U bcm_jax"),
    ({"format": None}, "bcm_jax"),
    ({"format": "one"}, "bcm_jax"),
    ({"step": None}, "step"),
    ({"step": "7", "average": None}, "step, average"),
    ({"dtype": "int4"}, "dtype"),
    ({"dtype": "bfloat16"}, "float32.*bfloat16"),
])
def test_headers_of_other_times(tmp_path, metadata, said):
  folder = written(tmp_path / "a")
  rewrite(folder, **metadata)
  assert re.search(said, fails(folder))


def test_a_newer_format_is_told_before_anything_else(tmp_path):
  folder = written(tmp_path / "a")
  rewrite(folder, format=9, tensors={"x": np.zeros(1, np.int8)})
  assert "format 9" in fails(folder)


def test_weights_of_other_libraries(tmp_path):
  folder = written(tmp_path / "a")
  path = str(folder / model_folder.WEIGHTS)
  weight_files.write(path, {"x": np.zeros(3, np.float32)})
  assert "convert" in fails(folder)
  torch_file = str(tmp_path / "x.pt")
  craft.save(torch_file, {"x": np.zeros(3, np.float32)})
  os.replace(torch_file, path)
  assert "convert" in fails(folder)


def test_a_tensor_below_another(tmp_path):
  folder = written(tmp_path / "a")
  rewrite(folder, lambda t: t.update({"conv": np.zeros(2, np.float32)}))
  assert "conv" in fails(folder)


@pytest.mark.parametrize("name", [model_folder.CONFIG, model_folder.RESULT])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 99999])
def test_damaged_json(tmp_path, name, content):
  folder = written(tmp_path / "a", result=RESULT)
  (folder / name).write_bytes(content)
  assert name in fails(folder)


def test_a_config_of_other_weights(tmp_path):
  folder = written(tmp_path / "a")
  config = json.loads((folder / model_folder.CONFIG).read_text())
  config["method"]["sigma_data"] = 0.5
  (folder / model_folder.CONFIG).write_text(json.dumps(config))
  said = fails(folder)
  assert hashing.json_digest(CONFIG)[:12] in said
  assert "--config.section.key" in said


@pytest.mark.parametrize("options, said", [
    ({"dtype": "float23"}, "'float32'"),
    ({"result": RESULT | {"step": 3}}, "3.*1900"),
    ({"result": RESULT | {"average": "params"}}, "average.*'params'"),
    ({"license_id": "do as you please"}, "do as you please"),
    ({"license_id": "mit\nevil: true"}, "evil"),
])
def test_refused_before_anything_is_written(tmp_path, options, said):
  with pytest.raises(errors.UserError, match=said):
    written(tmp_path / "a", **options)
  assert not os.listdir(tmp_path)


def test_values_that_a_dtype_cannot_hold(tmp_path):
  params = tree()
  params["conv"]["bias"][2] = 1e5
  with pytest.raises(errors.UserError, match=r"conv\.bias.*--dtype"):
    model_folder.write(
        str(tmp_path / "a"), CONFIG, params, ABOUT, dtype="float16"
    )
  assert not os.listdir(tmp_path)
  model_folder.write(
    str(tmp_path / "a"), CONFIG, params, ABOUT, dtype="bfloat16"
  )
  _, found, _ = model_folder.read(str(tmp_path / "a"))
  assert found["conv"]["bias"][2] == np.float32(ml_dtypes.bfloat16(1e5))


def test_nothing_is_written_over(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "mine").write_text("precious")
  with pytest.raises(errors.UserError, match=str(tmp_path / "a")):
    written(tmp_path / "a")
  assert os.listdir(tmp_path / "a") == ["mine"]
  assert os.listdir(tmp_path) == ["a"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(model_folder.files, "write_json", full)
  with pytest.raises(OSError):
    written(tmp_path / "a")
  assert not os.listdir(tmp_path)


# The card ------------------------------------------------------------------


def card(**options):
  """(front matter, text below it)."""
  metadata = dict(ABOUT, dtype="float32", config_digest="abc", bcm_jax="0.1")
  text = model_card.text(CONFIG, metadata, 398_233, **options)
  start, front, below = text.split("---\n", 2)
  assert not start
  return yaml.safe_load(front), below


def test_front_matter_is_what_the_hub_reads():
  front, _ = card(license_id="apache-2.0")
  assert front == {
    "library_name": "bcm_jax",
    "license": "apache-2.0",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["bcm_jax", "jax", "flax", "bcm"],
  }
  assert "license" not in card()[0]


def cells(text):
  """{first cell of a row: the others} of all tables."""
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  return {row[0]: row[1:] for row in rows}


def test_numbers_are_those_of_the_result():
  _, text = card(result=RESULT)
  found = cells(text)
  samplers = RESULT["samplers"].values()
  for name in ("FD (raw pixels)", "KID"):
    shown = [float(cell.split(" +- ")[0]) for cell in found[name]]
    np.testing.assert_allclose(shown, [s[name] for s in samplers], rtol=1e-3)
  assert found["KID"][0].endswith("+- 1.3e-05")
  assert found["bits_per_dim"] == ["3.142"] and found["mse"] == ["0.01235"]
  assert found["images seen in training"] == ["121,600"]
  assert found["training time"] == ["432 s"]
  assert "samples: 1000 of 50000" in text and "reference: digits" in text
  # Only what is a number: no plans, no seeds, no null.
  omitted = {"plan", "seeds", "std", "memorization_ratio", "legacy"}
  assert not omitted & found.keys()


def test_without_a_result_nothing_is_measured():
  _, text = card()
  found = cells(text)
  assert (
    found["images seen in training"]
    == found["training time"]
    == ["not measured"]
  )
  assert "## Metrics\n\nnot measured\n" in text
  assert not {"KID", "mse", "bits_per_dim"} & found.keys()


def test_the_card_says_what_it_is_and_how_to_load_it():
  _, text = card()
  assert "# bcm on digits" in text
  assert (
    "A bidirectional consistency model of 8x8 grey images of 10 classes" in text
  )
  assert cells(text)["network"] == [
    "`adm`, 398,233 parameters, stored as float32"
  ]
  assert "python -m bcm_jax.release.hub pull OWNER/NAME model" in text
  assert 'bcm_jax.load("model")' in text


def test_every_method_has_words():
  assert all(method.title for method in registry.METHODS.values())
  other = json.loads(json.dumps(CONFIG))
  other["method"]["name"] = "new"
  metadata = dict(ABOUT, dtype="float32", config_digest="a", bcm_jax="0.1")
  assert "A model of method new" in model_card.text(other, metadata, 1)


def test_header_steps_out_of_range(tmp_path):
  for step in (-5, 2**31, 10**300, True, 1.5):
    folder = written(tmp_path / f"{str(step)[:9]}")
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    header = weight_files.read(str(path)).metadata["bcm_jax"]
    changed = json.dumps(json.loads(header) | {"step": step})
    path.write_bytes(safetensors.numpy.save(tensors, {"bcm_jax": changed}))
    assert "step" in fails(folder)


@pytest.mark.parametrize("change", [
    lambda c: c.__setitem__("model", []),
    lambda c: c.__setitem__("method", None),
    lambda c: c.__setitem__("optimizer", None),
    lambda c: c.__setitem__("data", "digits"),
    lambda c: c["method"].__setitem__("name", ["bcm"]),
    lambda c: c["method"].__setitem__("name", {}),
    lambda c: c["model"].__setitem__("channel_mult", []),
    lambda c: c["model"].__setitem__("channel_mult", [0, 1]),
    lambda c: c["model"].__setitem__("min_group_channels", 0),
    lambda c: c["model"].__setitem__("num_heads", -1),
    lambda c: c["model"].__setitem__("model_channels", 0),
])
def test_hostile_configs(change, tmp_path):
  config = json.loads(json.dumps(CONFIG))
  change(config)
  model_folder.write(str(tmp_path / "f"), CONFIG, tree(), ABOUT)
  path = tmp_path / "f" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  header = json.loads(weight_files.read(str(path)).metadata["bcm_jax"])
  header["config_digest"] = hashing.json_digest(config)[:12]
  content = safetensors.numpy.save(tensors, {"bcm_jax": json.dumps(header)})
  path.write_bytes(content)
  (tmp_path / "f" / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match="model|method|optimizer|data"):
    model_folder.unpack(str(tmp_path / "f"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["README.md", "result.json", "config.json"])
def test_links_and_pipes_are_not_sent(name, tmp_path):
  folder = written(tmp_path / "f")
  model_folder.check_links(str(folder))
  path = folder / name
  path.unlink(missing_ok=True)
  (tmp_path / "secret").write_text("{}")
  path.symlink_to(tmp_path / "secret")
  with pytest.raises(errors.UserError, match="link"):
    model_folder.check_links(str(folder))
  path.unlink()
  path.symlink_to(tmp_path / "absent")
  with pytest.raises(errors.UserError, match="link"):
    model_folder.check_links(str(folder))
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(errors.UserError, match="regular file"):
    model_folder.check_links(str(folder))
  if name == "result.json":
    assert "regular file" in fails(folder)  # Without waiting for a writer.


def test_targets_inside_their_source(tmp_path):
  folder = written(tmp_path / "f")
  (tmp_path / "link").symlink_to(folder)
  for target in ("f/sub", "f/a/../sub", "link/sub"):
    with pytest.raises(errors.UserError, match="inside"):
      model_folder.unpack(str(folder), str(tmp_path / target))
  assert sorted(os.listdir(folder)) == [
      "README.md", "config.json", "model.safetensors"
  ]


def test_weights_that_are_not_finite():
  # The shipped network, with one value changed after its digest was checked.
  source = "bcm_jax/networks/digits"
  raw, params, metadata = model_folder.read(source)
  params["out_2"]["bias"] = np.full_like(params["out_2"]["bias"], np.nan)
  with mock.patch.object(
      model_folder, "read", lambda folder: (raw, params, metadata)
  ), pytest.raises(errors.UserError, match="not finite"):
    model_folder.load(source)
