"""The interface of a method: a frozen dataclass of options and modules.

A method declares networks, losses, averages, phases, a curriculum and a flow
map. Package `training` computes gradients, gradient accumulation, moving
averages, sharding and metrics. docs/methods.md has a complete example.
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
    curriculum: `Method.curriculum(step)`.
    networks: parameters of all trained networks, stop-gradiented.
    averages: moving averages by name, stop-gradiented.
    augment_labels: [B, 9], parameters of the augmentation; None without one.
    index: [B] int32, positions in the global batch.
    frozen: parameters of networks that are not trained, such as 'teacher'.
    shared_key: stream name -> one key of (seed, stream, step), the same for all
      examples of the global batch.
    extra: other fields of the batch, [B, ...] each, such as the noise from
      which an image was generated.
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
  """Adaptive weights of the terms of a loss (VQGAN; Esser et al., 2021, eq. 7).

  The weights depend on the gradient norms of the terms in the last layer. The
  gradients are those of the mean over the global batch, so that the weights do
  not depend on devices, hosts or microbatches.

  Attributes:
    terms: names of the terms.
    last_layer: tree of gradients -> gradient of the last layer.
    loss_weights: {term: gradient norm} -> {term: weight}, scalars.
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
    load_pretrained: (pretrained parameters, fresh parameters) -> initial
      parameters; raises ValueError if they do not fit. None uses the
      pretrained parameters unchanged.
    init_from: name of the frozen network whose parameters are the pretrained
      ones, unless training.init_from is set; None is random initialization.
    project: parameters -> parameters after each update, such as forced weight
      normalization; None is the identity.
    adaptive_weight: adaptive weights of the terms of the loss; None for a loss
      with one value per example.
    heads: top-level names of parameters that only losses use, such as a
      learned loss weight. Sampling, conversion and export omit them; if
      pretrained parameters lack them they are initialized.
  """

  network: nn.Module
  init: Callable[[jax.Array, jax.Array, jax.Array | None], Params]
  load_pretrained: Callable[[Params, Params], Params] | None = None
  init_from: str | None = None
  project: Callable[[Params], Params] | None = None
  adaptive_weight: AdaptiveWeight | None = None
  heads: tuple[str, ...] = ()

  def without_heads(self, params: Params) -> Params:
    """Returns the parameters without the heads, as for sampling."""
    if not self.heads:
      return params
    return {k: v for k, v in params.items() if k not in self.heads}


@dataclasses.dataclass(frozen=True)
class Average:
  """A moving average that the losses use, such as a target network.

  It is updated only in steps that update its network.

  Attributes:
    network: name of the network whose parameters are averaged.
    rate: key of the curriculum with the decay rate of a step.
  """

  network: str
  rate: str


@dataclasses.dataclass(frozen=True)
class FrozenRun:
  """Declaration of the sampled network of another run, such as a teacher.

  `Method.frozen[NAME]` adds the config keys method.NAME, a work directory DIR,
  DIR@STEP or None, and method.NAME_average. Field NAME of the method is the
  method of that run, or None; `Context.frozen[NAME]` are the parameters.

  Attributes:
    required_by: config section method -> the setting that requires the run, or
      None if it is optional.
    is_denoiser: whether the network must be a denoiser.
    shares: properties that must equal those of the student.
  """

  required_by: Callable[[Any], str | None] = lambda options: None
  is_denoiser: bool = True
  shares: tuple[str, ...] = ("images", "classes", "sigma_data", "data")

  def keys(self, name: str) -> dict[str, tuple[Any, Any]]:
    """Returns the config keys of the run: key -> (type, default)."""
    return {name: (str | None, None), f"{name}_average": (str | None, None)}

  def paths(self, name: str) -> tuple[str, ...]:
    """Returns the config keys of paths, which may change when a run resumes."""
    return (name,)


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
  """Declaration of a network from weight files or user code, such as LPIPS.

  Attributes:
    build: config section method -> an object whose init(key, images, labels)
      returns the parameters, or None if the options do not use the network. It
      becomes field NAME of the method, if the method has that field.
    config_keys: config keys to add: key -> (type, default).
    path_keys: config keys of paths, which may change when a run resumes.
  """

  build: Callable[[Any], Any]
  config_keys: Mapping[str, tuple[Any, Any]] = dataclasses.field(
      default_factory=dict
  )
  path_keys: tuple[str, ...] = ()

  def keys(self, name: str) -> dict[str, tuple[Any, Any]]:
    """Returns the config keys of the network: key -> (type, default)."""
    del name
    return dict(self.config_keys)

  def paths(self, name: str) -> tuple[str, ...]:
    """Returns the config keys of paths, which may change when a run resumes."""
    return self.path_keys or (name,)


def frozen_field() -> Any:
  """Returns the dataclass field of a frozen network; not a config key."""
  return dataclasses.field(kw_only=True, default_factory=lambda: None)


class Preset(NamedTuple):
  """Options that turn a method into another published method.

  Attributes:
    options: config key of section method -> default value.
    title: replaces Method.title; None keeps it.
    paper: replaces Method.paper; None keeps it.
  """

  options: Mapping[str, Any] = NOTHING
  title: str | None = None
  paper: str | None = None


class Method:
  """Base class of methods.

  Fields with a default are config keys, except functions. `network` is a field
  without default: the Linen module of config section model.

  Attributes:
    title: noun phrase for the trained network.
    paper: authors and year of the publication.
    networks: trained networks by name.
    losses: network -> (params, context) -> (loss [B], metrics [B] by name);
      pure, per example, not averaged. With an AdaptiveWeight the loss is
      {term: [B]}.
    averages: moving averages that the losses use, by name.
    frozen: networks that are not trained, by name.
    sampled_network: name of the network that `flow_map` uses.
    auxiliary_networks: whether other networks are trained, too; they use config
      section auxiliary_optimizer.
    takes_end_time: whether the flow map accepts any end level, or only
      sigma_min.
    supports_inversion: whether the flow map also maps images to noise.
    is_denoiser: whether the flow map is an Euler step of a denoiser, to which
      higher-order solvers and guidance apply.
    rounding: how samples become uint8, 'floor' or 'nearest', as in the released
      samplers; see image_source.to_uint8.
    sigma_min: lowest noise level of the flow map.
    sigma_max: highest noise level of the flow map.
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
  rounding = "floor"

  @classmethod
  def constraints(cls, config) -> str | None:
    """Checks a resolved config.

    Returns:
      Error text `key: got X, expected Y; fix`, or None.
    """
    del config

  @classmethod
  def extra_fields(cls, options) -> dict[str, str]:
    """Declares the fields of `Context.extra` that the losses use.

    Args:
      options: config section method.

    Returns:
      Field -> the setting that requires it, for errors.
    """
    del options
    return {}

  def phase(self, step: int) -> tuple[str, ...]:
    """Returns the names of the networks to update at a step; static."""
    del step
    return tuple(self.networks)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Returns all values of `phase`."""
    return (self.phase(0),)

  def num_updates(self, network: str, steps: int) -> int:
    """Returns how many of the first `steps` steps update a network."""
    if len(self.phases()) == 1:
      return steps
    return sum(network in self.phase(step) for step in range(steps))

  def curriculum(self, step: int) -> dict[str, Any]:
    """Returns scalars and arrays of a step, with the same shapes at all steps.
    """
    del step
    return {}

  def flow_map(self, params: Params) -> Callable[..., jax.Array]:
    """Returns f(x, t, u, labels) of parameters.

    f maps x [B, H, W, C] at noise levels t [B] to noise levels u [B]; labels
    are [B] int32 or None.
    """
    raise NotImplementedError


class SingleNetworkMethod(Method):
  """Base class of methods with one network, from `network`, `init`, `loss`."""

  @property
  def networks(self) -> Mapping[str, TrainableNetwork]:
    """The trained network, 'student'."""
    return {"student": TrainableNetwork(
        self.network, self.init,
        load_pretrained=getattr(self, "load_pretrained", None),
        project=getattr(self.network, "project", None),
    )}

  @property
  def losses(self) -> Mapping[str, Loss]:
    """The loss of the student."""
    return {"student": self.loss}


# Aliases, since a field of the class below hides the module.
Preconditioning = preconditioning.Preconditioning
PreconditioningName = preconditioning.Name
OuterSkip = preconditioning.OuterSkip


@dataclasses.dataclass(frozen=True)
class PreconditionedNetwork:
  """Preconditioned network (EDM; Karras et al., 2022, eq. 7) with an end level.

    f(x, t, u) = c_skip x + c_out F(c_in x, c_noise(t), c_noise(u))

  Attributes:
    network: F(x, c_noise, c_noise_end, labels, dropout_keys).
    c_noise: noise level -> conditioning value; default ln(t) / 4 (EDM, table
      1). Multiplied by registry.Model.c_noise_scale for some networks.
    preconditioning: name of the coefficients c_skip, c_out and c_in, see
      diffusion/preconditioning.py.
    sigma_data: standard deviation of images in [-1, 1].
    sigma_min: lowest noise level.
    sigma_max: highest noise level.
    rho: exponent of Karras grids (EDM, eq. 5).
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
    """True if the network has an end level u."""
    return self.network.two_time

  @property
  def coefficients(self) -> Preconditioning:
    """Preconditioning: (t, u) -> c_skip, c_out and c_in."""
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
    """Returns F(x, c_noise, c_noise_end) with these parameters and labels."""
    # Only networks with augment_dim have this argument.
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
    """Returns f(x, t, u, labels) without dropout.

    For a network without end level u must be sigma_min.
    """
    return lambda x, t, u, labels=None: self.f(params, x, t, u, labels)
