"""A checkpoint in, numbers out: mode eval, and the end of training."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import jax
import numpy as np

from bcm_jax import __version__
from bcm_jax import config as configs
from bcm_jax import experiment as experiments
from bcm_jax import files
from bcm_jax import generate
from bcm_jax import options
from bcm_jax import plots
from bcm_jax import runs
from bcm_jax.data import source as sources
from bcm_jax.metrics import judge
from bcm_jax.metrics import neighbours
from bcm_jax.metrics import precision_recall
from bcm_jax.metrics import reconstruction

# Data set -> classifier that says which class an image shows.
JUDGES = {"digits": judge.DigitJudge}


def _arrays(source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
  batch = source.fetch(np.arange(len(source)))
  return batch["image"], batch["label"]


def evaluate(
    experiment: experiments.Experiment, runner: generate.Runner, step: int
) -> dict[str, Any]:
  """All numbers of section eval for one set of parameters.

  Precision and recall are on raw pixels; see metrics.precision_recall.
  """
  section: options.Eval = experiment.section("eval")
  train = _arrays(experiment.source("train"))
  test = _arrays(experiment.source("test"))
  result: dict[str, Any] = {"step": step}
  referee = None
  if experiment.config.data.name in JUDGES:
    referee = JUDGES[experiment.config.data.name]().fit(*train)
    result["judge_test_accuracy"] = float(
        np.mean(referee.predict(test[0]) == test[1])
    )
  result["samplers"] = {}
  for sampler in section.samplers:
    plan = experiments.sampling_plan(experiment, sampler)
    result["samplers"][f"{plan.name}_nfe{plan.nfe}"] = {
        "plan": str(plan).splitlines(),
        **_sample_quality(experiment, runner, plan, referee, train, test),
    }
  result["inversion"] = {}
  for nfe in section.inversion_nfe if experiment.method.two_time else ():
    result["inversion"][f"nfe{nfe}"] = _inversion(experiment, runner, nfe)
  return result | {"protocol": _protocol(experiment, train, test)}


def _sample_quality(experiment, runner, plan, referee, train, test):
  """Recognition, precision, recall and memorisation of one sampler."""
  section: options.Eval = experiment.section("eval")
  labels = None
  if experiment.num_classes is not None:
    labels = np.arange(section.num_samples) % experiment.num_classes
    labels = labels.astype(np.int32)
  seed = experiment.config.sample.seed
  images = generate.generate(
      experiment, runner, plan, labels, section.num_samples, seed
  )
  numbers: dict[str, Any] = {}
  if referee is not None and labels is not None:
    numbers["recognised"] = _plain(
        judge.recognition(referee, images, labels)
    )
  chosen = np.random.default_rng(0).permutation(len(train[0]))
  real = train[0][chosen[: section.num_reference]]
  precision, recall = precision_recall.precision_recall(
      real, images, section.k
  )
  numbers |= {"precision": precision, "recall": recall}
  numbers["memorisation"] = _plain(
      neighbours.memorisation(images, train[0], test[0])
  )
  return numbers


def _inversion(experiment, runner, nfe: int) -> dict[str, Any]:
  """Reconstruction error of the test split, inverted in nfe steps."""
  section: options.Invert = experiment.section("invert")
  plan = experiments.inversion_plan(experiment, nfe)
  batch = generate.test_images(experiment, section.num_images)
  latents, images = generate.invert_and_reconstruct(
      experiment, runner, plan, batch, section.seed
  )
  mse = reconstruction.per_pixel_mse(batch["image"], images)
  return {
      "plan": str(plan).splitlines(),
      "images": len(mse),
      "mse": float(np.mean(mse)),
      "mse_worst_image": float(np.max(mse)),
      "latent_std": float(np.std(latents)),
  }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
  """Numbers as JSON knows them; NaN becomes null."""
  def one(v):
    if isinstance(v, dict):
      return {str(k): one(x) for k, x in v.items()}
    v = v.item() if hasattr(v, "item") else v
    return None if isinstance(v, float) and not np.isfinite(v) else v

  return one(values)


def _protocol(experiment, train, test) -> dict[str, Any]:
  """Everything that one must know to compare the numbers."""
  section: options.Eval = experiment.section("eval")
  config = experiment.config
  return {
      "data": config.data.name,
      "train_images": len(train[0]),
      "test_images": len(test[0]),
      "samples": section.num_samples,
      "reference_images": min(section.num_reference, len(train[0])),
      "reference_seed": 0,
      "features": "raw pixels",
      "neighbours_k": section.k,
      "seed": config.sample.seed,
      "average": config.sample.average or _first_average(config),
      "method": config.method.name,
      "config_digest": configs.digest(config),
      "bcm_jax": __version__,
      "commit": _commit(),
      "jax": jax.__version__,
      "flax": importlib.metadata.version("flax"),
      "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
                  f"{os.cpu_count()} cores, {platform.machine()}",
  }


def _first_average(config) -> str:
  rates = config.training.ema_rates
  return f"ema_{rates[0]:g}" if rates else "params"


def _commit() -> str | None:
  """Commit of the checkout that runs, or None for an installed package."""
  here = os.path.dirname(os.path.abspath(__file__))
  try:
    done = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, timeout=10, check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()


def summary(result: dict[str, Any]) -> str:
  """The numbers as lines for a terminal."""
  lines = [f"step {result['step']}"]
  if "judge_test_accuracy" in result:
    lines.append(
        f"judge: {result['judge_test_accuracy']:.2%} right on real test images"
    )
  for name, r in result["samplers"].items():
    parts = []
    if "recognised" in r:
      parts.append(
          f"recognised {r['recognised']['accuracy']:.1%} (worst class "
          f"{r['recognised']['worst_class']}: "
          f"{r['recognised']['worst_class_accuracy']:.0%})"
      )
    parts.append(f"precision {r['precision']:.3f}  recall {r['recall']:.3f}")
    lines.append(f"{name}: " + "  ".join(parts))
    m = r["memorisation"]
    lines.append(
        f"  median distance to the nearest training image: samples "
        f"{m['median_sample_to_train']:.1f}, real test images "
        f"{m['median_test_to_train']:.1f}"
    )
  for name, r in result["inversion"].items():
    lines.append(
        f"inversion {name}, reconstruction in 1: MSE {r['mse']:.5f} "
        f"on the [0, 1] scale ({r['images']} test images)"
    )
  return "\n".join(lines)


def run(experiment: experiments.Experiment, workdir: str) -> dict[str, Any]:
  """Mode eval: writes workdir/eval/<step>.json and prints the numbers."""
  step, params = runs.load_run(experiment, workdir)
  sample: options.Sample = experiment.section("sample")
  runner = generate.Runner(experiment, params, sample.batch_size)
  return _evaluate_and_write(experiment, workdir, runner, step)


def _evaluate_and_write(experiment, workdir, runner, step) -> dict[str, Any]:
  result = evaluate(experiment, runner, step)
  path = os.path.join(workdir, "eval", f"{step}.json")
  files.write_json(path, result)
  print(summary(result))
  print(f"numbers: {path}")
  return result


def finish(
    experiment: experiments.Experiment, workdir: str, step: int, params: Any
) -> dict[str, Any]:
  """The end of training: numbers, samples and pictures."""
  sample: options.Sample = experiment.section("sample")
  runner = generate.Runner(experiment, params, sample.batch_size)
  result = _evaluate_and_write(experiment, workdir, runner, step)
  folders = []
  for sampler in experiment.section("eval").samplers:
    folders.append(generate.sample(experiment, workdir, runner, sampler))
  if experiment.method.two_time:
    for nfe in experiment.section("eval").inversion_nfe:
      folders.append(generate.invert(experiment, workdir, runner, nfe))
    folders.append(generate.interpolate(experiment, workdir, runner))
  print("pictures: " + ", ".join(f"{f}/grid.png" for f in folders))
  print(f"all at a glance: {plots.overview(experiment, workdir)}")
  return result


def check_outputs(experiment: experiments.Experiment) -> None:
  """Finds bad times or labels before training, not after it."""
  for sampler in experiment.section("eval").samplers:
    experiments.sampling_plan(experiment, sampler)
  generate.asked_labels(experiment, experiment.section("sample"))
  if experiment.method.two_time:
    for nfe in experiment.section("eval").inversion_nfe:
      experiments.inversion_plan(experiment, nfe)
