"""Experiment: the objects that a resolved config describes."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, Generic, TypeVar

from flax import traverse_util
import jax
import ml_collections
import numpy as np
import optax

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.config import schema
from bcm_jax.config import validate
from bcm_jax.data import augmentation
from bcm_jax.data import datasets
from bcm_jax.data import image_source
from bcm_jax.data import pairs
from bcm_jax.diffusion import preconditioning
from bcm_jax.methods import base
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import optim
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step

T = TypeVar("T")


class _Section(Generic[T]):
  """Descriptor that returns a section of the config as its dataclass."""

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
  """Method, data, optimizers and settings of a resolved config.

  Attributes:
    config: resolved config.
    method: the training method with its network.
    image_shape: (H, W, C).
    num_classes: number of classes that the network is conditioned on, or None.
    frozen: networks that are not trained, by name: the Experiment of a run, or
      an object whose init(key, images, labels) returns the parameters.
    data: config section as schema.Data; the other sections likewise.
  """

  config: ml_collections.ConfigDict
  method: base.Method
  image_shape: tuple[int, int, int]
  num_classes: int | None
  frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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

  def check_config(self, meta: Mapping[str, Any], workdir: str) -> None:
    """Checks that config.json defines the same network as a checkpoint.

    Args:
      meta: metadata of the checkpoint.
      workdir: work directory of the run.

    Raises:
      UserError: the sections model and method, or the images, differ.
    """
    run = resolve.of_run(workdir)
    if run is not None and isinstance(meta.get("config"), Mapping):
      resolve.check_network(resolve.resolve(meta["config"]), run, workdir)

  def check_params(self, params: Any, place: str) -> None:
    """Checks that parameters are those of the sampled network.

    Args:
      params: tree of arrays.
      place: where they are from, for the error.

    Raises:
      UserError: other names or shapes.
    """
    network = self.method.networks[self.method.sampled_network]
    expected = network.without_heads(jax.eval_shape(
        network.init, jax.random.key(0), *example_batch(self)
    ))
    of_config, of_checkpoint = (
        {
            (name, np.shape(x))
            for name, x in traverse_util.flatten_dict(tree, sep=".").items()
        }
        for tree in (expected, params)
    )
    wrong = sorted({name for name, _ in of_config ^ of_checkpoint})
    if wrong:
      raise errors.UserError(
          f"config.model: got a network that differs from {place} in "
          f"{len(wrong)} tensors, such as {wrong[0]}, expected that of the "
          "checkpoint; restore config.json, or omit config.model.* values"
      )

  def frozen_keys(self) -> dict[str, str]:
    """Returns frozen network -> its key in config section method."""
    declared = registry.METHODS[self.config.method.name].cls.frozen
    return {name: part.paths(name)[0] for name, part in declared.items()}

  @property
  def levels(self) -> sampling_plan.NoiseRange:
    """Range of noise levels [sigma_min, sigma_max] of the method."""
    return sampling_plan.NoiseRange(
        self.method.sigma_min, self.method.sigma_max
    )

  def source(self, split: str) -> image_source.Source:
    """Opens the images of a split, 'train' or 'test'.

    Raises:
      UserError: the data set has no such split, or it cannot be read.
    """
    return _data_set(self.config).open(split, self.config.data.data_dir)

  def training_source(self) -> image_source.Source:
    """Opens the training images: data.pairs if set, else the train split."""
    data = self.config.data
    if data.pairs is None:
      return self.source("train")
    return pairs.PairSource(data.pairs, self.image_shape, self.num_classes)

  def has_split(self, split: str) -> bool:
    """Returns whether the data set declares a split; reads no images."""
    return split in _data_set(self.config).splits

  def source_if_available(self, split: str) -> image_source.Source | None:
    """Opens the images of a split; prints the reason if it returns None.

    Raises:
      UserError: data.path is set and cannot be read.
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
    """Returns network -> optimizer."""
    return {
        name: self.optimizer_of(name).build() for name in self.method.networks
    }

  def optimizer_of(self, network: str) -> optim.Optimizer:
    """Returns the optimizer settings of a network.

    The sampled network has config section optimizer, the other networks
    auxiliary_optimizer. Optimizers count updates, so schedule_steps is
    converted from training steps to updates of this network.
    """
    section = self.optimizer
    if network != self.method.sampled_network:
      section = self.auxiliary_optimizer
    if section.schedule == "constant":
      return section
    updates = self.method.num_updates(network, section.schedule_steps)
    return dataclasses.replace(section, schedule_steps=updates)

  def backend(self) -> sharding.Backend:
    """Returns the backend of training: jit over all devices, or pmap.

    Raises:
      UserError: parallel.sharding is invalid, or shards the state under pmap.
    """
    settings = self.parallel
    rules = sharding.parse_rules(settings.sharding)
    if settings.backend == "jit":
      return self.mesh_backend(jax.devices())
    if any(rule.spec != "replicate" for rule in rules):
      raise errors.UserError(
        f"parallel.sharding: got {settings.sharding} with "
        "parallel.backend='pmap', expected a replicated state; set "
        "parallel.backend='jit'"
      )
    return sharding.Pmap(tuple(jax.local_devices()))

  def mesh_backend(self, devices: Sequence[jax.Device]) -> sharding.Jit:
    """Returns the jit backend over devices; for a TPU topology, too."""
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
    replicated = all(rule.spec == "replicate" for rule in rules)
    local = several and replicated and len(devices) > 1
    return sharding.Jit(mesh, rules, local)

  def step_options(self, backend: sharding.Backend) -> train_step.StepOptions:
    """Returns the options of the training step for a backend."""
    training = self.training
    p = self.config.data.augment
    return train_step.StepOptions(
      seed=self.config.seed,
      ema_rates=training.ema_rates,
      ema_warmup=training.ema_warmup,
      ema_stds=training.ema_stds,
      ema_halflife_kimg=training.ema_halflife_kimg,
      ema_rampup_ratio=training.ema_rampup_ratio,
      batch_size=training.batch_size,
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
  """Builds an experiment and validates constraints across config sections.

  Args:
    config: resolved config.
    to_train: False skips the frozen networks, which only training needs;
      their files need not exist.

  Raises:
    UserError: sections of the config are incompatible.
  """
  frozen = _frozen(config) if to_train else {}
  method = _method(config, frozen)
  data = _data_set(config)
  config = _described(config, data)
  validate.model(config, data)
  validate.method(config)
  declared = registry.METHODS[config.method.name].cls.frozen
  for name, part in declared.items():
    if to_train and isinstance(part, base.FrozenRun):
      validate.frozen_run(config, data, name, part, frozen.get(name))
  return Experiment(
      config, method, data.image_shape, config.model.num_classes, frozen
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
    labels=data.labels,
  )


def _described(config, data: datasets.DataSet) -> ml_collections.ConfigDict:
  """Returns the config with the image shape and classes found in data.path."""
  if config.data.path is None:
    return config
  overrides = {
    "data.image_shape": str(tuple(data.image_shape)),
    "data.num_classes": str(data.num_classes),
  }
  return resolve.resolve(config.to_dict(), overrides)


def _frozen(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the frozen networks that the config names, see Experiment."""
  section, frozen = config.method, {}
  for name, declared in registry.METHODS[section.name].cls.frozen.items():
    if isinstance(declared, base.FrozenNetwork):
      part = declared.build(section)
    else:
      part = _run(f"method.{name}", section[name])
    if part is not None:
      frozen[name] = part
  return frozen


def _run(key: str, place: str | None) -> Experiment | None:
  """Returns the experiment of the run that a config key names."""
  if place is None:
    return None
  workdir, _ = runs.split_place(place, key)
  config = resolve.of_run(workdir)
  if config is None:
    raise errors.UserError(
        f"{key}: got {workdir}, which has no config.json, expected the work "
        "directory of a run; train one or convert published weights"
    )
  return build(config, to_train=False)


def _method(
    config: ml_collections.ConfigDict, frozen: Mapping[str, Any]
) -> base.Method:
  """Returns the method, with the options that are fields of its class."""
  options, section = config.model.to_dict(), config.method.to_dict()
  model = registry.MODELS[options.pop("name")]
  cls = registry.METHODS[section["name"]].cls
  fields = {f.name for f in dataclasses.fields(cls)}
  objects = {
      name: part.method if isinstance(part, Experiment) else part
      for name, part in frozen.items()
  } | {"network": model.cls(**options)}
  for name in cls.frozen:
    objects.setdefault(name, None)
  if "c_noise" in fields and model.c_noise_scale != 1:
    objects["c_noise"] = preconditioning.Scaled(
        cls.c_noise, model.c_noise_scale
    )
  values = section | objects
  return cls(**{k: v for k, v in values.items() if k in fields})


def example_batch(experiment: Experiment) -> tuple[Any, Any]:
  """Returns zeros to initialize networks: (images [1, H, W, C], labels [1]).

  Labels are None for an unconditional network.
  """
  images = np.zeros((1, *experiment.image_shape), np.float32)
  labels = None
  if experiment.num_classes is not None:
    labels = np.zeros((1,), np.int32)
  return images, labels


def network_inputs(
  experiment: Experiment, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns the fields of a batch that the training step takes.

  Removes example ids and, for an unconditional network, labels.
  """
  unused = ["example"]
  if experiment.num_classes is None:
    unused.append("label")
  return {k: v for k, v in batch.items() if k not in unused}


def frozen_shapes(experiment: Experiment) -> dict[str, Any]:
  """Returns the parameter shapes of the frozen networks; reads no files."""
  inputs = example_batch(experiment)

  def init(part, key):
    if not isinstance(part, Experiment):
      return part.init(key, *inputs)
    network = part.method.networks[part.method.sampled_network]
    return network.without_heads(network.init(key, *inputs))

  key = jax.random.key(0)
  return {
      name: jax.eval_shape(functools.partial(init, part), key)
      for name, part in experiment.frozen.items()
  }


def load_frozen(experiment: Experiment) -> dict[str, Any]:
  """Loads the parameters of the frozen networks, on the host.

  Args:
    experiment: experiment that uses the networks.

  Returns:
    Name -> parameters.

  Raises:
    UserError: a run has no good checkpoint.
  """
  section = experiment.config.method
  inputs = example_batch(experiment)

  def load(name, part):
    if isinstance(part, Experiment):
      workdir, at = runs.split_place(section[name], f"method.{name}")
      average = section[f"{name}_average"]
      return runs.load_run(part, workdir, average, at)[2]
    # A fixed key: random parameters are not saved, and a restart needs the
    # same ones.
    params = part.init(jax.random.key(0), *inputs)
    return jax.tree.map(np.asarray, params)

  return {k: load(k, v) for k, v in experiment.frozen.items()}


def create_state(
  experiment: Experiment, start_from: Any = None
) -> train_state.TrainState:
  """Creates the state before the first step; a pure function, can be jitted.

  Args:
    experiment: method, optimizers and settings.
    start_from: network -> parameters to start from, or None.

  Raises:
    ValueError: parameters in start_from do not fit the network.
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
    ema_halflife_kimg=training.ema_halflife_kimg,
  )
