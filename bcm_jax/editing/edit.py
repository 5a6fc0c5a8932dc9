"""Mode edit: edits images, writes comparisons and metrics.

  python -m bcm_jax.main --workdir=RUN --mode=edit --config.edit.task=inpaint \\
      --config.edit.input=photo.png --config.edit.mask=mask.png
"""

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

# Images of a task shown in its picture.
_SHOWN = 16
# Training images of either side, of which an attribute is taken.
_GROUP = 200


def settings(section: schema.Edit) -> dict[str, Any]:
  """Returns the settings of the recipe in config section `edit`."""
  return dict(
      noise=section.noise, level=section.sigma, nfe=section.nfe,
      times=section.times,
  )


def run(experiment: build.Experiment, workdir: str) -> list[str]:
  """Mode edit; returns the folders written.

  Raises:
    UserError: a task that the network cannot do, or images that do not fit.
  """
  section = experiment.edit
  # Before the checkpoint is read.
  tasks.recipe(experiment, section.task, **settings(section))
  inputs = edit_inputs.read(experiment)
  _, _, params = runs.load_run(experiment, workdir)
  size = experiment.config.sample.batch_size
  model = pretrained.Model(
    batched_sampler.BatchedSampler(
      experiment, params, min(size, len(inputs.images))
    )
  )
  if section.predict_labels:
    _classify(model, inputs)
  if section.task == "interpolate":
    return [interpolate(model, workdir, inputs)]
  return [_edit(model, workdir, inputs)]


def _classify(model: pretrained.Model, inputs: edit_inputs.Inputs) -> None:
  """Puts the classes that the network finds in place of those given."""
  section = model.experiment.edit
  inputs.labels = model.classify(_shown(section, inputs))
  print("classes found:", *inputs.labels)
  if inputs.second is not None:
    inputs.second_labels = model.classify(inputs.second)
    print("of the other ends:", *inputs.second_labels)


def _folder(workdir: str, task: str) -> str:
  return os.path.join(workdir, "edits", task)


def interpolate(
  model: pretrained.Model,
  workdir: str,
  inputs: edit_inputs.Inputs | None = None,
) -> str:
  """Rows between pairs of images, of section edit or these; their folder."""
  section = model.experiment.edit
  inputs = inputs or edit_inputs.read(model.experiment)
  asked = settings(section)
  recipe = model.recipe("interpolate", **asked)
  print(recipe)
  between = model.interpolate(
    inputs.images,
    inputs.second,
    inputs.labels,
    inputs.second_labels,
    section.num_interpolants,
    section.seed,
    **asked,
  )
  images = np.concatenate(
    [inputs.images[:, None], between, inputs.second[:, None]], axis=1
  )
  arrays = {"images": images}
  if inputs.labels is not None:
    arrays["labels"] = np.stack([inputs.labels, inputs.second_labels], axis=1)
  folder = _folder(workdir, "interpolate")
  _write_record(model, folder, recipe, images, {})
  files.write_npz(os.path.join(folder, "interpolation.npz"), **arrays)
  image_grid.save_png(
    os.path.join(folder, "grid.png"),
    image_grid.image_grid(
      images[:_SHOWN].reshape(-1, *images.shape[2:]),
      images.shape[1],
      scale=_scale(model),
    ),
  )
  return folder


def _scale(model: pretrained.Model) -> int:
  """Enlargement that makes small images visible."""
  return max(1, 64 // model.image_shape[0])


def _edit(
  model: pretrained.Model, workdir: str, inputs: edit_inputs.Inputs
) -> str:
  """Runs a task on images and writes them, a picture and numbers."""
  section = model.experiment.edit
  recipe = model.recipe(section.task, **settings(section))
  print(recipe)
  began = time.monotonic()
  results, more = perform(model, section, inputs)
  seconds = time.monotonic() - began
  folder = _folder(workdir, section.task)
  _write_images(folder, inputs, results)
  shown = _shown(section, inputs)
  rows = [("input", shown[:_SHOWN]), ("result", results[:_SHOWN])]
  if inputs.reference is not None:
    rows.append(("reference", inputs.reference[:_SHOWN]))
  image_grid.save_png(
    os.path.join(folder, "grid.png"),
    image_grid.captioned_rows(rows, scale=_scale(model)),
  )
  more["seconds_with_compilation"] = seconds
  if inputs.reference is not None:
    measure = similarity.perceptual(model.experiment.config.eval.lpips_path)
    more["numbers"] = {
      name: similarity.errors(inputs.reference, images, measure)
      for name, images in (("input", shown), ("result", results))
      if (images != inputs.reference).any()  # No decibels are infinite.
    }
    for name, numbers in more["numbers"].items():
      print(
        f"{name}: PSNR {numbers['psnr']:.2f} dB against the "
        f"reference ({len(results)} images)"
      )
  _write_record(model, folder, recipe, results, more)
  return folder


def _write_record(
  model: pretrained.Model,
  folder: str,
  recipe: tasks.Recipe,
  results: np.ndarray,
  more: dict[str, Any],
) -> None:
  """result.json: what was done, by what, and the numbers."""
  if model.experiment.config.edit.predict_labels:
    # Not part of the recipe, and paid for each image all the same.
    more = {
      "nfe_to_classify": model.num_classes
      * len(tasks.CLASS_TIMES)
      * tasks.CLASS_DRAWS,
      **more,
    }
  files.write_json(
    os.path.join(folder, "result.json"),
    {
      "task": recipe.task,
      "recipe": str(recipe).splitlines(),
      "nfe": recipe.nfe,
      "images": len(results),
      **more,
      "run": provenance.facts(model.experiment.config),
    },
  )


def _shown(section: schema.Edit, inputs: edit_inputs.Inputs) -> np.ndarray:
  """The images as they are edited: holes grey, small ones enlarged."""
  images = inputs.images
  if section.task.startswith("inpaint"):
    return edit_inputs.covered(images, inputs.mask)
  if section.task == "super_resolve":
    return images.repeat(section.factor, 1).repeat(section.factor, 2)
  return images


def perform(
  model: pretrained.Model, section: schema.Edit, inputs: edit_inputs.Inputs
) -> tuple[np.ndarray, dict[str, Any]]:
  """A task on images: (uint8 [n, H, W, C], what else came out)."""
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
      given = images if inputs.exact is None else inputs.exact
      out, levels = model.denoise(given, section.sigma, inputs.labels)
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
      f"edit.task={section.task!r} needs edit.new_label, the class to make"
    )
  return section.new_label


def _attribute(model, section: schema.Edit, images, common):
  """Moves latents along the way from one group of images to another."""
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
      "edit.task='attribute' needs folders edit.positive_images and "
      "edit.negative_images; "
      "between classes that the network knows go by 'relabel', between "
      "others by edit.label and edit.new_label"
    )
  direction = model.direction(
    *groups, *labels, seed=section.seed, **settings(section)
  )
  moved = model.shift(images, direction, section.strength, **common)
  return moved, {"direction_norm": float(np.linalg.norm(direction))}


def _one_label(section: schema.Edit) -> int:
  """The class of both groups."""
  if len(set(section.label)) != 1:
    raise errors.UserError(
      f"edit.label={section.label}: edit.task='attribute' takes one class, "
      "that of edit.positive_images and edit.negative_images too; or set "
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
  place = os.path.join(folder, "images")
  os.makedirs(place, exist_ok=True)
  for old in os.listdir(place):  # Of a run before, on other images.
    if old.endswith(".png"):
      os.remove(os.path.join(place, old))
  for name, image in zip(inputs.names, results, strict=True):
    image_grid.save_png(os.path.join(place, f"{name}.png"), image)
