"""The interface of a method: a frozen dataclass of options and modules.

A method declares networks, losses, averages, phases, a curriculum and a flow
map. The engine in `training` computes gradients, accumulation, moving averages,
sharding and metrics. docs/methods.md has a complete example.
"""

from collections.abc import Callable, Mapping
import dataclasses
import types
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.diffusion import preconditioning

Params = Any
Metrics = dict[str, jax.Array]
NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Context(NamedTuple):
  """Inputs of a loss in addition to its own network's parameters.

  Attributes:
    images: [B, H, W, C] float in [-1, 1].
    labels: [B] int32, or None.
    keys: stream name -> [B] keys, one per example. The keys of a stream depend
      only on (seed, stream, step, position in the global batch).
    curriculum: numbers and tables of `Method.curriculum(step)`.
    networks: parameters of every trained network, stop-gradiented.
    averages: moving averages by name, stop-gradiented.
    augment_labels: [B, 9], the augmentation of the images; None without one.
    index: [B] int32, positions in the global batch.
    frozen: parameters of networks that are not trained, such as 'teacher'.
    shared_key: stream name -> one key of (seed, stream, step), the same for all
      examples of the global batch.
    extra: further fields of an example, [B, ...] each, such as the noise that
      an image was generated from.
  """

  images: jax.Array
  labels: jax.Array | None
  keys: Callable[[str], jax.Array]
  curriculum: Mapping[str, Any]
  networks: Mapping[str, Params]
  averages: Mapping[str, Params]
  augment_labels: jax.Array | None = None
  index: jax.Array | None = None
  frozen: Mapping[str, Params] = NOTHING
  shared_key: Callable[[str], jax.Array] | None = None
  extra: Mapping[str, jax.Array] = NOTHING


# With an AdaptiveWeight the first result is {term: loss [B]}.
Loss = Callable[[Params, Context], tuple[Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
  """Weights of a loss's terms, computed from their gradients.

  The norms are of gradients of the mean over the global batch, so weights do
  not depend on devices, hosts or microbatches.

  Attributes:
    terms: names of the terms.
    last_layer: gradient of all parameters -> the tensor whose norm counts.
    loss_weights: {term: norm}, scalars -> {term: weight}, scalars.
  """

  terms: tuple[str, ...]
  last_layer: Callable[[Params], jax.Array]
  loss_weights: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class TrainableNetwork:
  """A network that is trained.

  Attributes:
    network: the Linen module.
    init: (key, images, labels) -> parameters.
    load_pretrained: (parameters of another run's network, fresh parameters) ->
      parameters to start from; raises ValueError where they do not fit. None
      takes them unchanged.
    init_from: name of the frozen network that it starts from where the run
      names no other; None starts fresh.
    project: parameters after an update -> parameters, such as forced weight
      normalization; None leaves them.
    adaptive_weight: weights of the terms of its loss; None where the loss is
      one number per example.
    heads: top-level names in its parameters that only losses read, such as a
      learned loss weight. Sampling, conversion and export omit them, and a
      start from parameters without them initializes them.
  """

  network: nn.Module
  init: Callable[[jax.Array, jax.Array, jax.Array | None], Params]
  load_pretrained: Callable[[Params, Params], Params] | None = None
  init_from: str | None = None
  project: Callable[[Params], Params] | None = None
  adaptive_weight: AdaptiveWeight | None = None
  heads: tuple[str, ...] = ()

  def without_heads(self, params: Params) -> Params:
    """Returns the parameters that sampling needs."""
    if not self.heads:
      return params
    return {k: v for k, v in params.items() if k not in self.heads}


@dataclasses.dataclass(frozen=True)
class Average:
  """A moving average that the losses read.

  It moves in steps that update its network, and only in those.

  Attributes:
    network: whose parameters are averaged.
    rate: key of the curriculum that holds the rate of a step.
  """

  network: str
  rate: str


@dataclasses.dataclass(frozen=True)
class FrozenRun:
  """The sampled network of another run; `Method.frozen` names it.

  It adds the config keys method.NAME, a work directory or None, and
  method.NAME_average. The method's field NAME is that run's method, or None;
  `Context.frozen[NAME]` holds the parameters.

  Attributes:
    required_by: section method -> the setting that needs it, or None.
    is_denoiser: whether it must be a denoiser.
    shares: properties in which it must agree with the student.
  """

  required_by: Callable[[Any], str | None] = lambda options: None
  is_denoiser: bool = True
  shares: tuple[str, ...] = ("images", "classes", "sigma_data", "data")

  def keys(self, name: str) -> dict[str, tuple[Any, Any]]:
    """Returns the config keys that it adds: key -> (type, default)."""
    return {name: (str | None, None), f"{name}_average": (str | None, None)}

  def paths(self, name: str) -> tuple[str, ...]:
    """Returns the config keys of its files, which may move between starts."""
    return (name,)


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
  """A network out of weight files or of a user's code.

  Attributes:
    build: section method -> an object whose init(key, images, labels) returns
      the parameters; None where the options do not ask for the network. The
      method's field NAME, if it has one, is that object.
    config_keys: config keys that it adds: key -> (type, default).
    path_keys: config keys of its files, which may move between starts.
  """

  build: Callable[[Any], Any]
  config_keys: Mapping[str, tuple[Any, Any]] = dataclasses.field(
      default_factory=dict
  )
  path_keys: tuple[str, ...] = ()

  def keys(self, name: str) -> dict[str, tuple[Any, Any]]:
    """Returns the config keys that it adds: key -> (type, default)."""
    del name
    return dict(self.config_keys)

  def paths(self, name: str) -> tuple[str, ...]:
    """Returns the config keys of its files."""
    return self.path_keys or (name,)


def frozen_field() -> Any:
  """Returns the dataclass field of a frozen network; no config key sets it."""
  return dataclasses.field(kw_only=True, default_factory=lambda: None)


class Preset(NamedTuple):
  """A published method that is another one with these options.

  Attributes:
    options: values of config keys in place of the class's defaults.
    title, paper: in place of the class's.
  """

  options: Mapping[str, Any] = NOTHING
  title: str | None = None
  paper: str | None = None


class Method:
  """The interface, with the usual declarations.

  Fields with a default are config keys, except functions. `network` is a field
  without default: the Linen module of section model.

  Attributes:
    title: what the sampled network is, in a few words.
    paper: the publication.
    networks: trained networks by name.
    losses: network -> (params, context) -> (loss [B], metrics of [B] each);
      pure, one per example, not averaged. With an AdaptiveWeight the first is
      {term: [B]}.
    averages: moving averages that the losses read.
    frozen: networks that are not trained, by name.
    sampled_network: the network whose parameters `flow_map` takes.
    auxiliary_networks: whether it trains others; section auxiliary_optimizer
      is for them.
    takes_end_time: whether the flow map takes any end level, or only
      sigma_min.
    supports_inversion: whether it also leads from images to noise.
    is_denoiser: whether it is Euler's step of a denoiser, which solvers may
      correct and guidance may change.
    sigma_min, sigma_max: levels between which the flow map is trained.
  """

  title = ""
  paper = ""
  networks: Mapping[str, TrainableNetwork]
  losses: Mapping[str, Loss]
  averages: Mapping[str, Average] = NOTHING
  frozen = NOTHING
  sampled_network = "student"
  auxiliary_networks = False
  takes_end_time = False
  supports_inversion = False
  is_denoiser = False

  @classmethod
  def constraints(cls, config) -> str | None:
    """Returns why sections of a config contradict the method, or None."""
    del config

  @classmethod
  def extra_fields(cls, options) -> dict[str, str]:
    """Returns fields of `Context.extra` that the losses read under section
    method's options, each with the setting that reads it."""
    del options
    return {}

  def phase(self, step: int) -> tuple[str, ...]:
    """Returns the networks to update at a step; static, on the host."""
    del step
    return tuple(self.networks)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Returns every value that `phase` can take."""
    return (self.phase(0),)

  def curriculum(self, step: int) -> dict[str, Any]:
    """Returns scalars and arrays of a step, of shapes that never change."""
    del step
    return {}

  def flow_map(self, params: Params) -> Callable[..., jax.Array]:
    """Returns f(x, t, u, labels): [B, H, W, C] from levels t [B] to u [B]."""
    raise NotImplementedError


class SingleNetworkMethod(Method):
  """A method that trains one network: it has `network`, `init` and `loss`."""

  @property
  def networks(self) -> Mapping[str, TrainableNetwork]:
    """The student."""
    return {"student": TrainableNetwork(
        self.network, self.init,
        load_pretrained=getattr(self, "load_pretrained", None),
        project=getattr(self.network, "project", None),
    )}

  @property
  def losses(self) -> Mapping[str, Loss]:
    """The student's."""
    return {"student": self.loss}


# By other names: a field hides the module in the class below.
Preconditioning = preconditioning.Preconditioning
PreconditioningName = preconditioning.Name


@dataclasses.dataclass(frozen=True)
class PreconditionedNetwork:
  """f(x, t, u) = c_skip x + c_out F(c_in x, c_noise(t), c_noise(u)).

  Attributes:
    network: F(x, c_noise, c_noise_end, labels, dropout_keys).
    c_noise: conditioning value of a level; ln(t) / 4 (EDM, table 1) unless a
      method wants another. A network may need it on a scale of its own
      (registry.Model.c_noise_scale).
    preconditioning: name of c_skip, c_out and c_in, see diffusion.
    sigma_data: standard deviation of images in [-1, 1].
    sigma_min, sigma_max, rho: range of levels and spacing of Karras grids.
  """

  network: nn.Module
  c_noise: Callable[[jax.Array], jax.Array] = preconditioning.edm_c_noise
  preconditioning: PreconditioningName = "cm"
  sigma_data: float = 0.5
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0

  @property
  def takes_end_time(self) -> bool:
    """Whether the network takes an end level."""
    return self.network.two_time

  @property
  def coefficients(self) -> Preconditioning:
    """(t, u) -> c_skip, c_out and c_in."""
    return preconditioning.by_name(
        self.preconditioning, self.sigma_data, self.sigma_min
    )

  def init(self, key, images, labels):
    """Returns parameters for images [B, H, W, C] and labels [B] or None."""
    t = jnp.ones(images.shape[:1], jnp.float32)
    end = t if self.network.two_time else None
    return self.network.init(key, images, t, end, labels)["params"]

  def apply_network(
      self, params, labels, dropout_keys=None, augment_labels=None
  ) -> Callable[..., jax.Array]:
    """Returns F(x, c_noise, c_noise_end) of these parameters."""
    # Only networks with augment_dim take them.
    extra = () if augment_labels is None else (augment_labels,)

    def network(x, c_noise, c_noise_end):
      end = c_noise_end if self.network.two_time else None
      return self.network.apply(
          {"params": params}, x, c_noise, end, labels, dropout_keys, *extra
      )

    return network

  def f(
      self, params, x, t, u, labels, dropout_keys=None, augment_labels=None
  ) -> jax.Array:
    """Returns f(x, t, u): x [B, ...] from levels t [B] to u [B]."""
    return preconditioning.precondition(
        self.apply_network(params, labels, dropout_keys, augment_labels),
        self.coefficients, x, t, u, self.c_noise,
    )

  def flow_map(self, params):
    """Returns f(x, t, u, labels) in evaluation mode; of a network without end
    level u must be sigma_min."""
    return lambda x, t, u, labels=None: self.f(params, x, t, u, labels)
