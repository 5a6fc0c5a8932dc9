"""Modes sample, invert and edit: images from a checkpoint."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import jax
import numpy as np

from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.data import image_source
from bcm_jax.editing import edit
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.generate import rejection
from bcm_jax.metrics import image_grid
from bcm_jax.metrics import reconstruction
from bcm_jax.utils import files

Params = Any


def scale(experiment) -> int:
  """Returns the factor by which image grids enlarge small images."""
  return max(1, 32 // experiment.image_shape[0])


# Modes ---------------------------------------------------------------------


def sample(
    experiment: build.Experiment,
    workdir: str,
    runner: batched_sampler.BatchedSampler,
    sampler: str | None = None,
    source: str = "",
) -> str:
  """Generates images; writes samples.npz, grid.png and, on request, PNG files.

  Images of other settings are kept, see files.keep_other.

  Args:
    experiment: config section sample.
    workdir: work directory of the run.
    runner: sampler with the parameters.
    sampler: in the notation of generate/planning.py; None is sample.sampler.
    source: description of the checkpoint.

  Returns:
    The folder. samples.npz has arr_0 [n, H, W, C] uint8 and, for a conditional
    network, arr_1 [n] int32 labels.

  Raises:
    UserError: the sampler or a label does not fit the network.
  """
  section = experiment.sample
  plan = planning.plan_of(experiment, sampler)
  labels = planning.requested_labels(experiment, section)
  rejection.check(experiment)
  print(plan)
  if section.rejection:
    images, labels = rejection.generate(
        experiment, runner, plan, section.num_samples, section.seed
    )
  else:
    images = batched_sampler.generate(
        experiment, runner, plan, labels, np.arange(section.num_samples),
        section.seed,
    )
  folder = os.path.join(workdir, "samples", f"{plan.name}_nfe{plan.nfe}")
  if jax.process_index():
    return folder
  files.keep_other(folder, _settings(section, source, plan))
  arrays = {"arr_0": images}
  if labels is not None:
    arrays["arr_1"] = labels
  files.write_npz(os.path.join(folder, "samples.npz"), **arrays)
  columns = experiment.num_classes if section.label is None else None
  if columns is None or columns > 16:
    columns = 10
  image_grid.save_png(
      os.path.join(folder, "grid.png"),
      image_grid.image_grid(
          images[: 10 * columns], columns, scale=scale(experiment)
      ),
  )
  if section.png:
    os.makedirs(os.path.join(folder, "png"), exist_ok=True)
    for i, image in enumerate(images):
      path = os.path.join(folder, "png", f"{i:06}.png")
      image_grid.save_png(path, image)
  return folder


def _settings(section, source: str, plan) -> dict[str, Any]:
  """Returns the settings that images depend on."""
  settings = dataclasses.asdict(section) | {
      "source": source, "plan": str(plan).splitlines()
  }
  return {k: v for k, v in settings.items() if k not in ("batch_size", "png")}


def invert(
    experiment: build.Experiment,
    workdir: str,
    runner: batched_sampler.BatchedSampler,
    nfe: int | None = None,
    source: str = "",
) -> str:
  """Encodes test images to latents and decodes them.

  Files of other settings are kept, see files.keep_other.

  Args:
    experiment: config section invert.
    workdir: work directory of the run.
    runner: sampler with the parameters.
    nfe: number of network evaluations of the inversion; None is invert.nfe.
    source: description of the checkpoint.

  Returns:
    The folder with inversion.npz (originals, latents, reconstructions, labels,
    mse [n] on the [0, 1] scale), result.json and grid.png.

  Raises:
    UserError: the network does not support inversion.
  """
  section = experiment.invert
  plan = planning.inversion_plan(experiment, nfe)
  print(plan)
  batch = batched_sampler.test_images(experiment, section.num_images)
  latents, images = batched_sampler.invert_and_reconstruct(
      experiment, runner, plan, batch, section.seed
  )
  mse = reconstruction.per_pixel_mse(batch["image"], images)
  folder = os.path.join(workdir, "inversions", f"nfe{plan.nfe}")
  if jax.process_index():
    return folder
  files.keep_other(folder, _settings(section, source, plan))
  files.write_npz(
      os.path.join(folder, "inversion.npz"), originals=batch["image"],
      latents=latents, reconstructions=images, labels=batch["label"], mse=mse,
  )
  files.write_json(
      os.path.join(folder, "result.json"),
      {"plan": str(plan).splitlines(), "images": len(images),
       "mse": float(mse.mean())},
  )
  first = slice(0, 16)
  rows = [
      ("original", batch["image"][first]),
      ("latent", latents_as_images(
          latents[first], experiment.method.sigma_max
      )),
      ("reconstruction", images[first]),
  ]
  image_grid.save_png(
      os.path.join(folder, "grid.png"),
      image_grid.captioned_rows(rows, scale=scale(experiment)),
  )
  print(f"reconstruction MSE on the [0, 1] scale: {mse.mean():.5f} "
        f"({len(images)} images)")
  return folder


def latents_as_images(latents: np.ndarray, sigma_max: float) -> np.ndarray:
  """Maps latents in [-3 sigma_max, 3 sigma_max] to uint8 images."""
  return image_source.to_uint8(latents / (3 * sigma_max))


def run(
    experiment: build.Experiment, workdir: str, mode: str
) -> Sequence[str]:
  """Loads a run and samples, inverts or edits.

  Args:
    experiment: experiment of the run.
    workdir: work directory of the run.
    mode: 'sample', 'invert' or 'edit'.

  Returns:
    The folders written.

  Raises:
    UserError: options do not fit the network, or no good checkpoint.
  """
  section = experiment.sample
  if mode == "edit":
    return edit.run(experiment, workdir)
  if mode == "sample":
    # Checks times and labels before reading the checkpoint.
    planning.plan_of(experiment)
    planning.requested_labels(experiment, section)
  else:
    planning.inversion_plan(experiment)
  step, average, params = runs.load_run(experiment, workdir)
  source = f"step {step}, {average}"
  runner = batched_sampler.BatchedSampler(
      experiment, params, section.batch_size
  )
  if mode == "sample":
    return [sample(experiment, workdir, runner, source=source)]
  return [invert(experiment, workdir, runner, source=source)]
