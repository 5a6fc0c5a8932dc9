"""A resolved config as objects: method, sources, optimisers."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Generic, TypeVar

import jax
import ml_collections
import numpy as np
import optax

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.config import schema
from bcm_jax.config import validate
from bcm_jax.data import augmentation
from bcm_jax.data import datasets
from bcm_jax.data import image_source
from bcm_jax.data import pairs
from bcm_jax.interop.families import vgg_names
from bcm_jax.methods import base
from bcm_jax.methods import projected
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import optim
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step

T = TypeVar("T")


class _Section(Generic[T]):
  """A section of the config as its dataclass, read when it is asked for."""

  def __init__(self, cls: type[T]):
    self.cls = cls

  def __set_name__(self, owner, name: str):
    self.name = name

  def __get__(self, experiment: "Experiment | None", owner=None) -> T:
    if experiment is None:
      raise AttributeError(self.name)
    return self.cls(**experiment.config[self.name].to_dict())


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a command works with.

  Attributes:
    config: resolved config.
    method: what is learnt.
    image_shape: (H, W, C).
    num_classes: classes that the network is conditioned on, or None.
    teacher: the experiment whose network method.teacher names, or None.
  """

  config: ml_collections.ConfigDict
  method: base.Method
  image_shape: tuple[int, int, int]
  num_classes: int | None
  teacher: "Experiment | None" = None

  data = _Section(schema.Data)
  training = _Section(schema.Training)
  optimizer = _Section(optim.Optimizer)
  auxiliary_optimizer = _Section(optim.Optimizer)
  parallel = _Section(schema.Parallel)
  checkpoint = _Section(schema.Checkpoint)
  log = _Section(schema.Log)
  sample = _Section(schema.Sample)
  invert = _Section(schema.Invert)
  edit = _Section(schema.Edit)
  eval = _Section(schema.Eval)
  search = _Section(schema.Search)

  @property
  def levels(self) -> sampling_plan.Range:
    """Noise levels that the network is trained on."""
    return sampling_plan.Range(self.method.sigma_min, self.method.sigma_max)

  def source(self, split: str) -> image_source.Source:
    """The images of a split, 'train' or 'test'."""
    return _data_set(self.config).open(split, self.config.data.data_dir)

  def training_source(self) -> image_source.Source:
    """What training reads: the train split, or data.pairs in its place."""
    data = self.config.data
    if data.pairs is None:
      return self.source("train")
    return pairs.PairSource(data.pairs, self.image_shape, self.num_classes)

  def has_split(self, split: str) -> bool:
    """Whether the data set has a split; nothing is read."""
    return split in _data_set(self.config).splits

  def source_if_there(self, split: str) -> image_source.Source | None:
    """The images of a split; None, and a line why, where they are not at hand.

    Raises:
      UserError: data.path is set, and cannot be read.
    """
    if not self.has_split(split):
      return None
    try:
      return self.source(split)
    except errors.UserError as e:
      if self.config.data.path is not None:
        raise
      print(f"no {split} images: {e}")
      return None

  def optimizers(self) -> dict[str, optax.GradientTransformation]:
    """An optimizer for each network: section optimizer for the sampled one,
    auxiliary_optimizer for the others."""
    return {
        name: (
            self.optimizer if name == self.method.sampled_network
            else self.auxiliary_optimizer
        ).build()
        for name in self.method.networks
    }

  def backend(self) -> sharding.Backend:
    """The devices that train: jit over a mesh, or pmap.

    Raises:
      UserError: parallel.sharding asks for what the backend cannot do.
    """
    settings = self.parallel
    rules = sharding.parse_rules(settings.sharding)
    if settings.backend == "jit":
      return self.mesh_backend(jax.devices())
    if any(rule.spec != "replicate" for rule in rules):
      raise errors.UserError(
          f"parallel.sharding={settings.sharding} needs parallel.backend='jit';"
          " under pmap every device holds the whole state"
      )
    return sharding.Pmap(tuple(jax.local_devices()))

  def mesh_backend(self, devices: Sequence[jax.Device]) -> sharding.Jit:
    """Devices under jit, also of machines that are not there."""
    settings = self.parallel
    rules = sharding.parse_rules(settings.sharding)
    mesh = sharding.make_mesh(devices, settings.fsdp)
    several = (
      sharding.microbatches(
        self.config.training.batch_size,
        len(devices),
        settings.microbatch_size_per_device,
      )
      > 1
    )
    whole = all(rule.spec == "replicate" for rule in rules)
    return sharding.Jit(mesh, rules, several and whole and len(devices) > 1)

  def step_options(self, backend: sharding.Backend) -> train_step.StepOptions:
    """Options of the training step on these devices."""
    training = self.training
    p = self.config.data.augment
    return train_step.StepOptions(
      seed=self.config.seed,
      ema_rates=training.ema_rates,
      ema_warmup=training.ema_warmup,
      ema_stds=training.ema_stds,
      microbatches=sharding.microbatches(
        training.batch_size,
        backend.devices,
        self.config.parallel.microbatch_size_per_device,
      ),
      axis_name=backend.axis_name,
      augment=augmentation.training_pipe(p) if p else None,
    )


def build(
  config: ml_collections.ConfigDict, to_train: bool = True
) -> Experiment:
  """Makes an experiment and checks that its parts fit together.

  Args:
    config: resolved.
    to_train: False where networks are only used, as by samplers: those that
      training alone needs (a teacher, a discriminator's encoder) are left
      out, and may be gone.

  Raises:
    UserError: for a config whose parts contradict one another.
  """
  teacher = _teacher(config) if to_train else None
  method = _method(config, teacher, to_train)
  data = _data_set(config)
  config = _described(config, data)
  validate.model(config, data)
  validate.method(config)
  if to_train:
    validate.teacher(config, data, teacher)
  return Experiment(
    config, method, data.image_shape, config.model.num_classes, teacher
  )


def _data_set(config: ml_collections.ConfigDict) -> datasets.DataSet:
  data = config.data
  return datasets.find(
    data.name,
    tuple(data.image_shape),
    data.num_classes,
    path=data.path,
    size=data.size,
    crop=data.crop,
    skip_corrupt=data.skip_corrupt,
    channels=data.channels,
    threads=data.threads or None,
  )


def _described(config, data: datasets.DataSet) -> ml_collections.ConfigDict:
  """The config with what files under data.path turned out to hold."""
  if config.data.path is None:
    return config
  overrides = {
    "data.image_shape": str(tuple(data.image_shape)),
    "data.num_classes": str(data.num_classes),
  }
  return resolve.resolve(config.to_dict(), overrides)


def _teacher(config: ml_collections.ConfigDict) -> Experiment | None:
  """The experiment of the run that method.teacher names."""
  workdir = config.method.get("teacher")
  if workdir is None:
    return None
  found = resolve.of_run(workdir)
  if found is None:
    raise errors.UserError(
      f"method.teacher={workdir} holds no run (no config.json); train one "
      "with method.name='edm', or convert published weights"
    )
  return build(found, to_train=False)


def _method(
  config: ml_collections.ConfigDict,
  teacher: Experiment | None,
  to_train: bool,
) -> base.Method:
  model = config.model.to_dict()
  module, noise, _ = registry.MODELS[model.pop("name")]
  numbers = config.method.to_dict()
  cls = registry.METHODS[numbers.pop("name")].cls
  scalings = registry.PRECONDITIONINGS[numbers.pop("preconditioning")](numbers)
  if "teacher" in numbers:
    del numbers["teacher"], numbers["teacher_average"]
    numbers["teacher"] = None if teacher is None else teacher.method
  if "gan_encoder" in numbers:
    name, path = numbers["gan_encoder"], numbers.pop("gan_encoder_path")
    numbers["gan_encoder"] = (
      projected.by_name(name, tuple(path))
      if to_train and name != "teacher"
      else None
    )
  return cls(network=module(**model), scalings=scalings, noise=noise, **numbers)


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
  """What of a batch the step takes: no example ids, labels if conditional."""
  unused = ["example"]
  if experiment.num_classes is None:
    unused.append("label")
  return {k: v for k, v in batch.items() if k not in unused}


def frozen_shapes(experiment: Experiment) -> dict[str, Any]:
  """Shapes of the networks that are not trained; reads no weights."""
  frozen, images_and_labels = {}, example_batch(experiment)
  if experiment.teacher is not None:
    method = experiment.teacher.method
    frozen["teacher"] = method.networks[method.sampled_network].init
  if experiment.config.method.get("metric") == "lpips":
    frozen["lpips"] = lambda *_: vgg_names.load_lpips(
      *experiment.config.method.lpips_path
    )
  encoder = getattr(experiment.method, "gan_encoder", None)
  if encoder is not None:
    frozen["gan_encoder"] = encoder.init
  key = jax.random.key(0)
  return {
    name: jax.eval_shape(functools.partial(init, key, *images_and_labels))
    for name, init in frozen.items()
  }


def create_state(
  experiment: Experiment, start_from: Any = None
) -> train_state.TrainState:
  """The state before the first step; pure, so it can be jitted.

  Args:
    start_from: network -> parameters of another run, or None.
  """
  training = experiment.training
  images, labels = example_batch(experiment)
  return train_state.create(
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
