"""Validates constraints across config sections; names no method."""

from typing import Any

import ml_collections

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.data import augmentation
from bcm_jax.data import datasets
from bcm_jax.methods import base

# Field of an example, other than image and label -> section and key of the file
# that contains it.
_EXTRA_FIELDS = {"noise": ("data", "pairs")}


def model(
    config: ml_collections.ConfigDict, data: datasets.DataSet
) -> None:
  """Checks that the network fits the images.

  Raises:
    UserError: image shape, channels, classes or widths do not match.
  """
  section, name = config.model, config.data.name
  if not section.channel_mult or min(section.channel_mult) < 1:
    raise errors.UserError(
        f"model.channel_mult: got {tuple(section.channel_mult)}, expected "
        "positive widths of at least one level; change it"
    )
  height, width, channels = data.image_shape
  halvings = 2 ** (len(section.channel_mult) - 1)
  if height % halvings or width % halvings:
    raise errors.UserError(
        f"model.channel_mult: got {tuple(section.channel_mult)}, which halves "
        f"images {len(section.channel_mult) - 1} times, expected at most "
        f"{_max_levels(height, width)} entries for images of {name} "
        f"({height}x{width}); remove some"
    )
  if section.out_channels != channels:
    raise errors.UserError(
        f"model.out_channels: got {section.out_channels}, expected {channels} "
        f"for images of {name}; set model.out_channels={channels}"
    )
  if section.num_classes is not None and data.num_classes is None:
    raise errors.UserError(
        f"model.num_classes: got {section.num_classes}, expected None, since "
        f"images of {name} have no labels; set model.num_classes=none, or sort "
        f"the images into one folder per class{datasets.CLASSES_HINT}"
    )
  more = (section.num_classes or 0) - (data.num_classes or 0)
  if section.num_classes and (
      more < 0 or more and not config.data.allow_fewer_classes
  ):
    raise errors.UserError(
        f"model.num_classes: got {section.num_classes}, expected "
        f"{data.num_classes} for labels of {name}; set "
        f"model.num_classes={data.num_classes}" + (
            ", or data.allow_fewer_classes=true for a network with classes "
            "that this data does not train" if more > 0 else ""
        )
    )
  labels = augmentation.LABEL_DIM
  if config.data.augment and section.get("augment_dim") != labels:
    raise errors.UserError(
        f"data.augment: got {config.data.augment} with "
        f"model.augment_dim={section.get('augment_dim')}, expected a network "
        "with augmentation labels, without which it generates augmented "
        f"images; set model.augment_dim={labels} or data.augment=0"
    )
  _check_widths(section)


def _check_widths(model) -> None:
  """Checks that groups and heads divide the widths; raises UserError."""
  for mult in model.channel_mult:
    width = model.model_channels * mult
    groups = model.get("num_groups")
    if groups:
      groups = min(groups, width // model.min_group_channels)
    if groups and width % groups:
      raise errors.UserError(
          f"model.num_groups: got {model.num_groups}, expected a divisor of "
          f"{width} channels; change model.num_groups, model.model_channels or "
          "model.channel_mult"
      )
  heads = model.get("num_head_channels")
  if heads and width % heads:
    raise errors.UserError(
        f"model.num_head_channels: got {heads}, expected a divisor of {width}, "
        "the channels of the coarsest level; choose one, or set it to none and "
        "set model.num_heads"
    )


def _max_levels(height: int, width: int) -> int:
  levels = 1
  while height % 2 == 0 and width % 2 == 0:
    height, width, levels = height // 2, width // 2, levels + 1
  return levels


def method(config: ml_collections.ConfigDict) -> None:
  """Checks the method's own constraints and those across sections.

  Raises:
    UserError: sections of the config are incompatible.
  """
  section, data = config.method, config.data
  cls = registry.METHODS[section.name].cls
  text = cls.constraints(config)
  if text is not None:
    raise errors.UserError(text)
  for field, reader in cls.extra_fields(section).items():
    if config[_EXTRA_FIELDS[field][0]][_EXTRA_FIELDS[field][1]] is None:
      key = ".".join(_EXTRA_FIELDS[field])
      raise errors.UserError(
          f"{key}: got None, expected a file with the {field!r} of each image, "
          f"which {reader} needs; write one by mode pairs or change that key"
      )
  if data.pairs and (data.flip or data.augment):
    raise errors.UserError(
        f"data.pairs: got {data.pairs} with data.flip={data.flip} and "
        f"data.augment={data.augment}, expected neither, since they change the "
        "image of a noise; set both to 0"
    )
  low, high = section.get("sigma_min"), section.get("sigma_max")
  if low is not None and not 0 < low < high:
    raise errors.UserError(
        f"method.sigma_min: got {low} with method.sigma_max={high}, expected "
        "0 < sigma_min < sigma_max; change one of them"
    )


def frozen_run(
    config: ml_collections.ConfigDict,
    data: datasets.DataSet,
    name: str,
    declared: base.FrozenRun,
    run: Any,
) -> None:
  """Checks a frozen network of another run against the method's declaration.

  Args:
    config: config of the student.
    data: data set of the student.
    name: name of the frozen network.
    declared: properties that the method requires of the run.
    run: Experiment of the run, or None.

  Raises:
    UserError: the run is missing, is not a denoiser, or differs from the
      student in a shared property.
  """
  denoiser = registry.methods_with("is_denoiser")
  if run is None:
    reader = declared.required_by(config.method)
    if reader is not None:
      raise errors.UserError(
          f"method.{name}: got None, expected the work directory of a run, "
          f"which {reader} needs; train one with {denoiser} or convert "
          "published weights"
      )
    return
  workdir = config.method[name]
  if declared.is_denoiser and not run.method.is_denoiser:
    raise errors.UserError(
        f"method.{name}: got {workdir}, a run of "
        f"method.name={run.config.method.name!r}, expected a denoiser; train "
        f"one with {denoiser} or convert published weights"
    )
  labels = run.config.model.get("augment_dim")
  if config.data.augment and labels != augmentation.LABEL_DIM:
    raise errors.UserError(
        f"method.{name}: got {workdir} with model.augment_dim={labels}, "
        f"expected {augmentation.LABEL_DIM}, since the student trains on "
        f"augmented images; use another run or set data.augment=0"
    )
  data_name, run_data_name = config.data.name, run.config.data.name
  if "none" in (data_name, run_data_name) or config.data.path is not None:
    run_data_name = data_name  # The names do not identify the data.
  for part, value, run_value in (
      ("images", tuple(data.image_shape), run.image_shape),
      ("classes", config.model.num_classes, run.num_classes),
      ("sigma_data", config.method.get("sigma_data"),
       run.config.method.get("sigma_data")),
      ("data", data_name, run_data_name),
  ):
    if part in declared.shares and value != run_value:
      raise errors.UserError(
          f"method.{name}: got {workdir} with {part} {run_value}, expected "
          f"{value} as in this config; use a run of the same data"
      )
