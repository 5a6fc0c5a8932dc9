"""The Colab notebooks run from top to bottom, with small budgets."""

import json
import pathlib

import jax
import nbclient
import nbformat
import numpy as np
import pytest

from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.generate import convert
from tests import toys

COLAB = pathlib.Path(__file__).resolve().parents[2] / "launch" / "colab"
NOTEBOOKS = sorted(p.name for p in COLAB.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stripped(name):
  notebook = nbformat.read(COLAB / name, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None
  (parameters,) = [
      c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())
  ]
  assert "OWNER/bcm_jax" in parameters.source


def execute(name, tmp_path, **parameters):
  """Runs a notebook with other parameters; returns its outputs as text."""
  notebook = nbformat.read(COLAB / name, as_version=4)
  for cell in notebook.cells:
    if "parameters" in cell.metadata.get("tags", ()):
      cell.source += "".join(f"\n{k} = {v!r}" for k, v in parameters.items())
  client = nbclient.NotebookClient(
      notebook, timeout=300, kernel_name="python3",
      resources={"metadata": {"path": str(tmp_path)}},
  )
  client.execute()
  outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
  text = "".join(o.get("text", "") for o in outputs)
  return text, sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
def test_digits(tmp_path):
  text, pictures = execute(
      "quickstart.ipynb", tmp_path, STEPS=4,
      OVERRIDES={
          **toys.TINY,
          "training.batch_size": "16", "eval.at_end": "false",
          "eval.samplers": "onestep", "eval.inversion_nfe": "1,",
          "sample.batch_size": "20",
          "optimizer.schedule": "constant", "optimizer.warmup_steps": "0",
      },
  )
  assert pictures == 7
  assert "reconstruction MSE 0." in text and "inpaint: 14 NFE" in text
  # Run again, it goes on from what is there.
  assert json.loads((tmp_path / "runs/digits/config.json").read_text())


@pytest.mark.slow
def test_a_published_checkpoint(tmp_path):
  config = resolve.resolve(
      resolve.read_file("imagenet64.py"),
      {"model.model_channels": "32", "model.num_head_channels": "32",
       "model.channel_mult": "1,1", "model.num_res_blocks": "1",
       "model.attention_resolutions": "()"},
  )
  built = build.build(config)
  params = jax.jit(built.method.init)(
      jax.random.key(0), *build.example_batch(built)
  )
  source = tmp_path / "source"
  runs.write(
      str(source), resolve.to_json(built.config), built.method.sampled_network,
      jax.tree.map(np.asarray, params), 7, {},
  )
  convert.to_file(str(source), str(tmp_path / "ema_0.9_000007.safetensors"))
  # Inception's weights are not at hand: three numbers an image are features.
  (tmp_path / "tiny.py").write_text(
      "def colours(images):\n"
      "  return images.reshape(len(images), -1, 3).mean(axis=1)\n"
  )
  np.savez(tmp_path / "reference.npz", mu=np.full(3, 127.0), sigma=np.eye(3))
  text, pictures = execute(
      "imagenet64.ipynb", tmp_path,
      WEIGHTS="ema_0.9_000007.safetensors", SAMPLES=4,
      CONVERT={"model.num_head_channels": "32"}, IMAGE_SIZE=64,
      EVALUATE={
          "eval.features": "tiny:colours", "eval.reference": "reference.npz",
          "eval.samplers": "onestep", "eval.num_samples": "8",
          "eval.allow_fewer_samples": "true", "eval.inversion_nfe": "()",
          "sample.batch_size": "4",
      },
  )
  assert "openai" in text and "ancestral@2.4" in text
  assert pictures == 3 and "reconstruction MSE" in text
  (result,) = (tmp_path / "runs" / "bcm" / "eval").glob("*.json")
  numbers = json.loads(result.read_text())["samplers"]["onestep_nfe1"]
  assert any(key.startswith("FD") for key in numbers)
