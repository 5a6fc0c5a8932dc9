"""Validates constraints across config sections; no method is named here."""

from typing import Any

import ml_collections

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.data import augmentation
from bcm_jax.data import datasets
from bcm_jax.methods import base

# Keys that must not be smaller.
_AT_LEAST = {
    "training.num_steps": 1, "training.batch_size": 1,
    "training.max_consecutive_nonfinite": 1, "training.max_rollbacks": 0,
    "training.watchdog_timeout_secs": 0, "checkpoint.every_steps": 1,
    "checkpoint.keep": 1, "checkpoint.max_failures": 1,
    "parallel.fsdp": 0, "parallel.microbatch_size_per_device": 0,
    "parallel.substeps": 1, "parallel.heartbeat_secs": 1,
    "log.every_steps": 1,
}
# Fields of an example besides image and label: the config key that names their
# file.
_EXTRA_FIELDS = {"noise": ("data", "pairs")}


def model(
    config: ml_collections.ConfigDict, data: datasets.DataSet
) -> None:
  """Raises UserError for a network that does not fit the images."""
  section, name = config.model, config.data.name
  height, width, channels = data.image_shape
  halvings = 2 ** (len(section.channel_mult) - 1)
  if height % halvings or width % halvings:
    raise errors.UserError(
        f"images of {name} are {height}x{width} and cannot be halved "
        f"{len(section.channel_mult) - 1} times, as model.channel_mult="
        f"{tuple(section.channel_mult)} asks; use at most "
        f"{_max_levels(height, width)} levels"
    )
  if section.out_channels != channels:
    raise errors.UserError(
        f"model.out_channels={section.out_channels}, but images of {name} have "
        f"{channels}; set model.out_channels={channels}"
    )
  if section.num_classes is not None and data.num_classes is None:
    raise errors.UserError(
        f"model.num_classes={section.num_classes}, but images of {name} have "
        "no labels; set model.num_classes=none, or sort the images into one "
        "folder a class"
    )
  if section.num_classes is not None and data.num_classes > section.num_classes:
    raise errors.UserError(
        f"model.num_classes={section.num_classes}, but labels of {name} go up "
        f"to {data.num_classes}; set model.num_classes={data.num_classes}"
    )
  labels = augmentation.LABEL_DIM
  if config.data.augment and section.get("augment_dim") != labels:
    raise errors.UserError(
        f"data.augment={config.data.augment} changes images, and the network "
        "must be told how, or it will generate such images; set "
        f"model.augment_dim={labels}, or data.augment=0"
    )
  _check_widths(section)


def _check_widths(model) -> None:
  """Raises UserError for widths that norms or heads cannot divide."""
  for mult in model.channel_mult:
    width = model.model_channels * mult
    groups = model.get("num_groups")
    if groups:
      groups = min(groups, width // model.min_group_channels)
    if groups and width % groups:
      raise errors.UserError(
          f"model.num_groups={model.num_groups} does not divide {width} "
          "channels; change model_channels, channel_mult or num_groups"
      )
  heads = model.get("num_head_channels")
  if heads and width % heads:
    raise errors.UserError(
        f"model.num_head_channels={heads} does not divide the {width} channels "
        "of the lowest level, which attends; choose a divisor, or None and "
        "model.num_heads"
    )


def _max_levels(height: int, width: int) -> int:
  levels = 1
  while height % 2 == 0 and width % 2 == 0:
    height, width, levels = height // 2, width // 2, levels + 1
  return levels


def method(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for sections that contradict one another."""
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
          f"which {reader} reads; write one by mode pairs, or change that key"
      )
  if data.pairs and (data.flip or data.augment):
    raise errors.UserError(
        "data.pairs holds images with their noise, which data.flip and "
        "data.augment would separate; set both to 0"
    )
  low, high = section.get("sigma_min"), section.get("sigma_max")
  if low is not None and not 0 < low < high:
    raise errors.UserError(
        f"method.sigma_min={low} and sigma_max={high} must satisfy "
        "0 < sigma_min < sigma_max"
    )
  for key, least in _AT_LEAST.items():
    part, name = key.split(".")
    value = config[part][name]
    if value is not None and value < least:
      raise errors.UserError(f"{key}={value} must be at least {least}")
  for rate in config.training.ema_rates:
    if not 0 <= rate < 1:
      raise errors.UserError(
          f"training.ema_rates holds {rate}; rates lie in [0, 1)"
      )


def frozen_run(
    config: ml_collections.ConfigDict,
    data: datasets.DataSet,
    name: str,
    declared: base.FrozenRun,
    run: Any,
) -> None:
  """Raises UserError unless a run fits what a method declares of it.

  Args:
    config: of the student.
    data: its images.
    name: of the frozen network.
    declared: what it must be and share.
    run: its Experiment, or None.
  """
  denoiser = registry.methods_with("is_denoiser")
  if run is None:
    reader = declared.required_by(config.method)
    if reader is not None:
      raise errors.UserError(
          f"method.{name}: got None, expected the work directory of a run, "
          f"which {reader} needs; train one with {denoiser}, or convert "
          "published weights"
      )
    return
  what = f"method.{name}={config.method[name]}"
  if declared.is_denoiser and not run.method.is_denoiser:
    raise errors.UserError(
        f"{what} is no denoiser (method.name={run.config.method.name!r}); "
        f"give a run of {denoiser}, or converted weights of one"
    )
  ours, theirs = config.data.name, run.config.data.name
  if "none" in (ours, theirs) or config.data.path is not None:
    theirs = ours  # Names say nothing.
  for part, own, its in (
      ("images", tuple(data.image_shape), run.image_shape),
      ("classes", config.model.num_classes, run.num_classes),
      ("sigma_data", config.method.get("sigma_data"),
       run.config.method.get("sigma_data")),
      ("data", ours, theirs),
  ):
    if part in declared.shares and own != its:
      raise errors.UserError(
          f"{what} has {part} {its}, and this config {own}; both must be "
          "trained on the same data"
      )
