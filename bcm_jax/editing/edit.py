"""Mode edit: edits images, compares them with references, writes the results.

  python -m bcm_jax.main --workdir=RUN --mode=edit --config.edit.task=inpaint \\
      --config.edit.input=photo.png --config.edit.mask=mask.png
"""

import dataclasses
import os
import time
from typing import Any

import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.editing import edit_inputs
from bcm_jax.editing import pretrained
from bcm_jax.editing import similarity
from bcm_jax.editing import tasks
from bcm_jax.generate import batched_sampler
from bcm_jax.metrics import image_grid
from bcm_jax.utils import files
from bcm_jax.utils import provenance

# Number of images in grid.png.
_GRID_IMAGES = 16
# Number of training images per class for an attribute direction.
_GROUP = 200


def settings(section: schema.Edit) -> dict[str, Any]:
  """Returns the arguments of tasks.recipe from config section `edit`."""
  return dict(
      noise=section.noise, level=section.sigma, nfe=section.nfe,
      times=section.times,
  )


def run(experiment: build.Experiment, workdir: str) -> list[str]:
  """Runs mode edit; returns the folders written.

  Raises:
    UserError: the network does not support the task, or unsuitable images.
  """
  section = experiment.edit
  # Checks the task and its settings before the checkpoint is read.
  tasks.recipe(experiment, section.task, **settings(section))
  inputs = edit_inputs.read(experiment)
  step, average, params = runs.load_run(experiment, workdir)
  size = experiment.config.sample.batch_size
  model = pretrained.Model(
    batched_sampler.BatchedSampler(
      experiment, params, min(size, len(inputs.images))
    ),
    f"step {step}, {average}",
  )
  if section.predict_labels:
    _classify(model, inputs)
  if section.task == "interpolate":
    return [interpolate(model, workdir, inputs)]
  return [_edit(model, workdir, inputs)]


def _classify(model: pretrained.Model, inputs: edit_inputs.Inputs) -> None:
  """Replaces the labels by those that the network predicts."""
  section = model.experiment.edit
  inputs.labels = model.classify(_network_inputs(section, inputs))
  print("predicted labels:", *inputs.labels)
  if inputs.second is not None:
    inputs.second_labels = model.classify(inputs.second)
    print("predicted labels of edit.end_images:", *inputs.second_labels)


def _folder(model: pretrained.Model, workdir: str, task: str) -> str:
  """Returns the folder of a task; edits of other settings are kept."""
  folder = os.path.join(workdir, "edits", task)
  files.keep_other(
    folder,
    {"source": model.source, **dataclasses.asdict(model.experiment.edit)},
  )
  return folder


def interpolate(
  model: pretrained.Model,
  workdir: str,
  inputs: edit_inputs.Inputs | None = None,
) -> str:
  """Interpolates between pairs of images and writes one row per pair.

  Args:
    model: model that supports inversion.
    workdir: work directory of the run.
    inputs: pairs of images; None reads those of config section `edit`.

  Returns:
    The folder written.
  """
  section = model.experiment.edit
  inputs = inputs or edit_inputs.read(model.experiment)
  kwargs = settings(section)
  recipe = model.recipe("interpolate", **kwargs)
  print(recipe)
  interpolated = model.interpolate(
    inputs.images,
    inputs.second,
    inputs.labels,
    inputs.second_labels,
    section.num_interpolants,
    section.seed,
    **kwargs,
  )
  images = np.concatenate(
    [inputs.images[:, None], interpolated, inputs.second[:, None]], axis=1
  )
  arrays = {"images": images}
  if inputs.labels is not None:
    arrays["labels"] = np.stack([inputs.labels, inputs.second_labels], axis=1)
  folder = _folder(model, workdir, "interpolate")
  _write_record(model, folder, recipe, images, {})
  files.write_npz(os.path.join(folder, "interpolation.npz"), **arrays)
  image_grid.save_png(
    os.path.join(folder, "grid.png"),
    image_grid.image_grid(
      images[:_GRID_IMAGES].reshape(-1, *images.shape[2:]),
      images.shape[1],
      scale=_scale(model),
    ),
  )
  return folder


def _scale(model: pretrained.Model) -> int:
  """Returns the enlargement of images in grid.png."""
  return max(1, 64 // model.image_shape[0])


def _edit(
  model: pretrained.Model, workdir: str, inputs: edit_inputs.Inputs
) -> str:
  """Edits images; writes them, grid.png and result.json. Returns the folder."""
  section = model.experiment.edit
  recipe = model.recipe(section.task, **settings(section))
  print(recipe)
  start = time.monotonic()
  results, record = perform(model, section, inputs)
  seconds = time.monotonic() - start
  folder = _folder(model, workdir, section.task)
  _write_images(folder, inputs, results)
  network_inputs = _network_inputs(section, inputs)
  rows = [
    ("input", network_inputs[:_GRID_IMAGES]),
    ("result", results[:_GRID_IMAGES]),
  ]
  if inputs.reference is not None:
    rows.append(("reference", inputs.reference[:_GRID_IMAGES]))
  image_grid.save_png(
    os.path.join(folder, "grid.png"),
    image_grid.captioned_rows(rows, scale=_scale(model)),
  )
  record["seconds_with_compilation"] = seconds
  if inputs.reference is not None:
    measure = similarity.perceptual(model.experiment.config.eval.lpips_path)
    record["numbers"] = {
      name: similarity.errors(inputs.reference, images, measure)
      for name, images in (("input", network_inputs), ("result", results))
      # The PSNR of identical images is infinite.
      if (images != inputs.reference).any()
    }
    for name, numbers in record["numbers"].items():
      print(
        f"{name}: PSNR {numbers['psnr']:.2f} dB against the "
        f"reference ({len(results)} images)"
      )
  _write_record(model, folder, recipe, results, record)
  return folder


def _write_record(
  model: pretrained.Model,
  folder: str,
  recipe: tasks.Recipe,
  results: np.ndarray,
  record: dict[str, Any],
) -> None:
  """Writes result.json: recipe, metrics and provenance."""
  if model.experiment.config.edit.predict_labels:
    # Evaluations per image in addition to those of the recipe.
    record = {
      "nfe_to_classify": model.num_classes
      * len(tasks.CLASS_TIMES)
      * tasks.CLASS_DRAWS,
      **record,
    }
  files.write_json(
    os.path.join(folder, "result.json"),
    {
      "task": recipe.task,
      "recipe": str(recipe).splitlines(),
      "nfe": recipe.nfe,
      "images": len(results),
      **record,
      "run": provenance.facts(model.experiment.config),
    },
  )


def _network_inputs(
  section: schema.Edit, inputs: edit_inputs.Inputs
) -> np.ndarray:
  """Returns images at the network's size: holes gray, small images enlarged."""
  images = inputs.images
  if section.task.startswith("inpaint"):
    return edit_inputs.covered(images, inputs.mask)
  if section.task == "super_resolve":
    return images.repeat(section.factor, 1).repeat(section.factor, 2)
  return images


def perform(
  model: pretrained.Model, section: schema.Edit, inputs: edit_inputs.Inputs
) -> tuple[np.ndarray, dict[str, Any]]:
  """Edits images: (uint8 [n, H, W, C], entries for result.json)."""
  images, common = (
    inputs.images,
    dict(labels=inputs.labels, seed=section.seed, **settings(section)),
  )
  match section.task:
    case "inpaint" | "inpaint_cm":
      return model.inpaint(images, inputs.mask, task=section.task, **common), {}
    case "super_resolve":
      return model.super_resolve(images, section.factor, **common), {}
    case "denoise":
      noisy = images if inputs.exact is None else inputs.exact
      out, levels = model.denoise(noisy, section.sigma, inputs.labels)
      return out, {"levels": [float(v) for v in levels]}
    case "relabel":
      return model.relabel(images, new_labels=_new_label(section), **common), {}
    case "attribute":
      return _attribute(model, section, images, common)
    case task:
      return getattr(model, task)(images, **common), {}


def _new_label(section: schema.Edit) -> int:
  if section.new_label is None:
    raise errors.UserError(
      f"edit.new_label: got None, expected the target class of "
      f"edit.task={section.task!r}"
    )
  return section.new_label


def _attribute(model, section: schema.Edit, images, common):
  """Shifts latents along the direction between two groups of images."""
  labels = (None, None)
  if None not in (section.positive_images, section.negative_images):
    groups = [
      edit_inputs.read_folder(model.experiment, path, f"edit.{key}")
      for key, path in (
        ("positive_images", section.positive_images),
        ("negative_images", section.negative_images),
      )
    ]
    if section.predict_labels and model.num_classes is not None:
      labels = tuple(model.classify(group) for group in groups)
    elif model.num_classes is not None:
      labels = (_one_label(section),) * 2
  elif model.num_classes is None and len(section.label) == 1:
    groups = [
      edit_inputs.of_class(model.experiment, label, _GROUP)
      for label in (_new_label(section), section.label[0])
    ]
  else:
    raise errors.UserError(
      "edit.positive_images, edit.negative_images: got None, expected two "
      "folders for edit.task='attribute'; for two classes use "
      "edit.task='relabel', or edit.label and edit.new_label if the network "
      "has no classes"
    )
  direction = model.direction(
    *groups, *labels, seed=section.seed, **settings(section)
  )
  moved = model.shift(images, direction, section.strength, **common)
  return moved, {"direction_norm": float(np.linalg.norm(direction))}


def _one_label(section: schema.Edit) -> int:
  """Returns the class of both groups of images."""
  if len(set(section.label)) != 1:
    raise errors.UserError(
      f"edit.label: got {section.label}, expected one class, also of "
      "edit.positive_images and edit.negative_images; or set "
      "edit.predict_labels=true"
    )
  return section.label[0]


def _write_images(folder: str, inputs, results: np.ndarray) -> None:
  arrays = {"images": inputs.images, "results": results}
  if inputs.labels is not None:
    arrays["labels"] = inputs.labels
  if inputs.reference is not None:
    arrays["reference"] = inputs.reference
  files.write_npz(os.path.join(folder, "edit.npz"), **arrays)
  image_folder = os.path.join(folder, "images")
  os.makedirs(image_folder, exist_ok=True)
  for old in os.listdir(image_folder):  # Results of an earlier edit.
    if old.endswith(".png"):
      os.remove(os.path.join(image_folder, old))
  for name, image in zip(inputs.names, results, strict=True):
    image_grid.save_png(os.path.join(image_folder, f"{name}.png"), image)
