"""Whether the parts of a config fit together; the words where they do not."""

from typing import Any

import ml_collections

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.data import augmentation
from bcm_jax.data import datasets

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
  section, two_time = config.method, config.model.get("two_time")
  if section.name == "bcm":
    _check_end_levels(section, two_time)
  if section.name in ("edm", "dmd", "dmd2") and two_time:
    raise errors.UserError(
        f"method.name={section.name!r} trains a denoiser, which takes no end "
        "level; set model.two_time=False"
    )
  if section.name == "ctm" and not (
      two_time and config.model.end_branch == "blocks"
  ):
    raise errors.UserError(
        "method.name='ctm' needs a network with an end level in every block; "
        "set model.two_time=True and model.end_branch='blocks'"
    )
  if section.get("metric") == "lpips" and not section.lpips_path:
    raise errors.UserError(
        "method.metric='lpips' needs weights: set method.lpips_path as "
        "docs/evaluation.md says, or method.metric='features'"
    )
  data = config.data
  if section.get("regression_weight") and not data.pairs:
    raise errors.UserError(
        "method.name='dmd' regresses on pairs of the teacher; set data.pairs "
        "to a file of mode pairs, or method.regression_weight=0"
    )
  if data.pairs and (data.flip or data.augment):
    raise errors.UserError(
        "data.pairs brings images with their noise, which data.flip and "
        "data.augment would tear apart; set both to 0"
    )
  if not 0 < section.sigma_min < section.sigma_max:
    raise errors.UserError(
        f"method.sigma_min={section.sigma_min} and sigma_max="
        f"{section.sigma_max} must satisfy 0 < sigma_min < sigma_max"
    )
  if "s0" in section and not 1 <= section.s0 <= section.s1:
    raise errors.UserError(
        f"method.s0={section.s0} and s1={section.s1} must satisfy 1 <= s0 <= s1"
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


def _check_end_levels(section, two_time: bool) -> None:
  """Raises UserError where jumps to any level cannot be learnt."""
  if not two_time:
    raise errors.UserError(
        "method.name='bcm' needs a network with an end level; set "
        "model.two_time=True"
    )
  if section.time_distribution == "continuous":
    raise errors.UserError(
        "method.time_distribution='continuous' has no grid to draw end levels "
        "from; use 'lognormal' or 'uniform' with method.name='bcm'"
    )
  if section.preconditioning not in ("bcm", "ctm"):
    raise errors.UserError(
        f"method.preconditioning={section.preconditioning!r} has no end level; "
        "use 'bcm' with method.name='bcm'"
    )


def teacher(
    config: ml_collections.ConfigDict, data: datasets.DataSet, found: Any
) -> None:
  """Raises UserError unless the teacher denoises images of this data.

  Args:
    config: of the student.
    data: its images.
    found: the teacher's Experiment, or None.
  """
  numbers = config.method
  if found is None:
    if numbers.name in registry.NEED_TEACHER:
      raise errors.UserError(
          f"method.name={numbers.name!r} learns from a teacher; name the work "
          "directory of one by method.teacher (train it with "
          "method.name='edm', or convert published weights)"
      )
    if numbers.get("gan") and numbers.gan_encoder == "teacher":
      raise errors.UserError(
          "method.gan=True judges by a teacher's features; name the work "
          "directory of a denoiser by method.teacher, or another network by "
          "method.gan_encoder"
      )
    return
  what = f"method.teacher={numbers.teacher}"
  if not found.method.is_denoiser:
    raise errors.UserError(
        f"{what} is no denoiser (method.name={found.config.method.name!r}); "
        "give a run of method.name='edm', or converted weights of one"
    )
  for name, mine, its in (
      ("images", tuple(data.image_shape), found.image_shape),
      ("classes", config.model.num_classes, found.num_classes),
      ("sigma_data", numbers.sigma_data, found.method.sigma_data),
  ):
    if mine != its:
      raise errors.UserError(
          f"{what} has {name} {its}, and this config {mine}; a teacher must "
          "have learnt the same data"
      )
  mine, its = config.data.name, found.config.data.name
  if mine != its and "none" not in (mine, its) and config.data.path is None:
    raise errors.UserError(
        f"{what} was trained on {its}, and this config names {mine}; a teacher "
        "must have learnt the same data"
    )
