"""A resolved config as objects: method, sources, optimisers."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from bcm_jax import config as configs
from bcm_jax import errors
from bcm_jax import options
from bcm_jax.data import augmentation
from bcm_jax.data import registry
from bcm_jax.data import source as sources
from bcm_jax.methods import base
from bcm_jax.sampling import plan as plans
from bcm_jax.training import optim
from bcm_jax.training import parallel
from bcm_jax.training import state as states
from bcm_jax.training import step as steps

# Keys that must not be smaller.
_AT_LEAST = {
    "training.num_steps": 1, "training.batch_size": 1,
    "training.max_skipped_in_row": 1, "training.max_rollbacks": 0,
    "training.hang_secs": 0, "checkpoint.every_steps": 1,
    "checkpoint.keep": 1, "checkpoint.max_failures": 1,
    "parallel.fsdp": 0, "parallel.max_examples": 0,
    "parallel.steps_per_call": 1, "parallel.heartbeat_secs": 1,
    "log.every_steps": 1,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a command works with.

  Attributes:
    config: resolved config.
    method: what is learnt.
    image_shape: (H, W, C).
    num_classes: classes that the network is conditioned on, or None.
  """

  config: ml_collections.ConfigDict
  method: base.Method
  image_shape: tuple[int, int, int]
  num_classes: int | None

  @property
  def levels(self) -> plans.Range:
    """Noise levels that the network is trained on."""
    return plans.Range(self.method.sigma_min, self.method.sigma_max)

  def section(self, name: str) -> Any:
    """A section of the config as its dataclass."""
    return configs.build_section(self.config, name)

  def source(self, split: str) -> sources.Source:
    """The images of a split, 'train' or 'test'."""
    return _data_set(self.config).open(split, self.config.data.data_dir)

  def has_split(self, split: str) -> bool:
    """Whether the data set has a split; nothing is read."""
    return split in _data_set(self.config).splits

  def optimizers(self) -> dict[str, optax.GradientTransformation]:
    """An optimiser for every player."""
    optimizer: optim.Optimizer = self.section("optimizer")
    return {name: optimizer.build() for name in self.method.players}

  def backend(self) -> parallel.Backend:
    """The devices that train: jit over a mesh, or pmap.

    Raises:
      UserError: parallel.sharding asks for what the backend cannot do.
    """
    settings: options.Parallel = self.section("parallel")
    rules = parallel.parse_rules(settings.sharding)
    if settings.backend == "jit":
      return self.mesh_backend(jax.devices())
    if any(rule.spec != "replicate" for rule in rules):
      raise errors.UserError(
          f"parallel.sharding={settings.sharding} needs parallel.backend='jit';"
          " under pmap every device holds the whole state"
      )
    return parallel.Pmap(tuple(jax.local_devices()))

  def mesh_backend(self, devices: Sequence[jax.Device]) -> parallel.Jit:
    """Devices under jit, also of machines that are not there."""
    settings: options.Parallel = self.section("parallel")
    rules = parallel.parse_rules(settings.sharding)
    mesh = parallel.make_mesh(devices, settings.fsdp)
    several = parallel.microbatches(
        self.config.training.batch_size, len(devices), settings.max_examples
    ) > 1
    whole = all(rule.spec == "replicate" for rule in rules)
    return parallel.Jit(mesh, rules, several and whole and len(devices) > 1)

  def step_options(self, backend: parallel.Backend) -> steps.StepOptions:
    """Options of the training step on these devices."""
    training: options.Training = self.section("training")
    p = self.config.data.augment
    return steps.StepOptions(
        seed=self.config.seed,
        ema_rates=training.ema_rates,
        ema_warmup=training.ema_warmup,
        ema_stds=training.ema_stds,
        microbatches=parallel.microbatches(
            training.batch_size, backend.devices,
            self.config.parallel.max_examples,
        ),
        axis_name=backend.axis_name,
        augment=augmentation.training_pipe(p) if p else None,
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Makes an experiment and checks that its parts fit together.

  Raises:
    UserError: for a config whose parts contradict one another.
  """
  method = _method(config)
  data = _data_set(config)
  config = _described(config, data)
  _check_model(config, data)
  _check_method(config)
  return Experiment(
      config, method, data.image_shape, config.model.num_classes
  )


def _data_set(config: ml_collections.ConfigDict) -> registry.DataSet:
  data = config.data
  return registry.find(
      data.name, tuple(data.image_shape), data.num_classes, path=data.path,
      size=data.size, crop=data.crop, skip_corrupt=data.skip_corrupt,
      channels=data.channels, threads=data.threads or None,
  )


def _described(config, data: registry.DataSet) -> ml_collections.ConfigDict:
  """The config with what files under data.path turned out to hold."""
  if config.data.path is None:
    return config
  overrides = {
      "data.image_shape": str(tuple(data.image_shape)),
      "data.num_classes": str(data.num_classes),
  }
  return configs.resolve(config.to_dict(), overrides)


def _method(config: ml_collections.ConfigDict) -> base.Method:
  model = config.model.to_dict()
  module, noise, _ = configs.MODELS[model.pop("name")]
  numbers = config.method.to_dict()
  cls, _ = configs.METHODS[numbers.pop("name")]
  scalings = configs.PRECONDITIONINGS[numbers.pop("preconditioning")](numbers)
  return cls(
      network=module(**model), scalings=scalings, noise=noise, **numbers
  )


def _check_model(config, data: registry.DataSet) -> None:
  model, name = config.model, config.data.name
  height, width, channels = data.image_shape
  halvings = 2 ** (len(model.channel_mult) - 1)
  if height % halvings or width % halvings:
    raise errors.UserError(
        f"images of {name} are {height}x{width} and cannot be halved "
        f"{len(model.channel_mult) - 1} times, as model.channel_mult="
        f"{tuple(model.channel_mult)} asks; use at most "
        f"{_max_levels(height, width)} levels"
    )
  if model.out_channels != channels:
    raise errors.UserError(
        f"model.out_channels={model.out_channels}, but images of {name} have "
        f"{channels}; set model.out_channels={channels}"
    )
  if model.num_classes is not None and data.num_classes is None:
    raise errors.UserError(
        f"model.num_classes={model.num_classes}, but images of {name} have no "
        "labels; set model.num_classes=none, or sort the images into one "
        "folder a class"
    )
  if model.num_classes is not None and data.num_classes > model.num_classes:
    raise errors.UserError(
        f"model.num_classes={model.num_classes}, but labels of {name} go up "
        f"to {data.num_classes}; set model.num_classes={data.num_classes}"
    )
  labels = augmentation.LABEL_DIM
  if config.data.augment and model.get("augment_dim") != labels:
    raise errors.UserError(
        f"data.augment={config.data.augment} changes images, and the network "
        "must be told how, or it will generate such images; set "
        f"model.augment_dim={labels}, or data.augment=0"
    )
  _check_widths(model)


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


def _check_method(config: ml_collections.ConfigDict) -> None:
  method = config.method
  if method.name == "bcm" and not config.model.get("two_time"):
    raise errors.UserError(
        "method.name='bcm' needs a network with an end level; set "
        "model.two_time=True"
    )
  if method.name == "bcm" and method.bins == "continuous":
    raise errors.UserError(
        "method.bins='continuous' has no grid to draw end levels from; use "
        "'lognormal' or 'uniform' with method.name='bcm'"
    )
  if method.name == "bcm" and method.preconditioning not in ("bcm", "ctm"):
    raise errors.UserError(
        f"method.preconditioning={method.preconditioning!r} has no end level; "
        "use 'bcm' with method.name='bcm'"
    )
  if not 0 < method.sigma_min < method.sigma_max:
    raise errors.UserError(
        f"method.sigma_min={method.sigma_min} and sigma_max="
        f"{method.sigma_max} must satisfy 0 < sigma_min < sigma_max"
    )
  if not 1 <= method.s0 <= method.s1:
    raise errors.UserError(
        f"method.s0={method.s0} and s1={method.s1} must satisfy 1 <= s0 <= s1"
    )
  training = config.training
  for key, least in _AT_LEAST.items():
    section, name = key.split(".")
    value = config[section][name]
    if value is not None and value < least:
      raise errors.UserError(f"{key}={value} must be at least {least}")
  for rate in training.ema_rates:
    if not 0 <= rate < 1:
      raise errors.UserError(
          f"training.ema_rates holds {rate}; rates lie in [0, 1)"
      )


def example_batch(experiment: Experiment) -> tuple[Any, Any]:
  """A batch of zeros to initialise networks with: images, labels or None."""
  images = np.zeros((1, *experiment.image_shape), np.float32)
  labels = None
  if experiment.num_classes is not None:
    labels = np.zeros((1,), np.int32)
  return images, labels


def network_inputs(
    experiment: Experiment, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """What of a batch the step takes: image, index, and label if conditional."""
  keys = ["image", "index"]
  if experiment.num_classes is not None:
    keys.append("label")
  return {k: batch[k] for k in keys}


def create_state(
    experiment: Experiment, start_from: Any = None
) -> states.TrainState:
  """The state before the first step; pure, so it can be jitted.

  Args:
    start_from: player -> parameters of another run, or None.
  """
  training: options.Training = experiment.section("training")
  images, labels = example_batch(experiment)
  return states.create(
      experiment.method,
      experiment.optimizers(),
      training.ema_rates,
      experiment.config.seed,
      images,
      labels,
      start_from,
      loss_scaling=experiment.config.model.dtype == "float16",
      ema_stds=training.ema_stds,
  )
