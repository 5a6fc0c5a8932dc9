"""What a method is: networks, losses, phases, a curriculum and a flow map.

A method is a frozen dataclass of numbers and modules. It declares; the engine
in `training` does gradients, accumulation, averages, sharding and metrics.
"""

from collections.abc import Callable, Mapping
import dataclasses
import types
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax

Params = Any
Metrics = dict[str, jax.Array]


class Context(NamedTuple):
  """What a loss may read beside its own network's parameters.

  Attributes:
    images: [B, H, W, C] float in [-1, 1].
    labels: [B] int32, or None.
    keys: stream name -> [B] keys, one an example. A stream's keys depend on
      (seed, stream, step, position in the global batch) alone.
    curriculum: numbers and tables of `Method.curriculum(step)`.
    networks: parameters of every network, stop-gradiented.
    averages: moving averages by name, stop-gradiented.
    augment_labels: [B, 9], what data.augmentation did to the images; None
      where it did nothing.
    index: [B] int32, positions in the global batch.
    frozen: parameters of networks that are not trained, such as 'teacher'.
    shared_key: stream name -> one key of (seed, stream, step), the same for all
      examples of the global batch.
    extra: what else an example brings, [B, ...] each, such as the noise that
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
  frozen: Mapping[str, Params] = types.MappingProxyType({})
  shared_key: Callable[[str], jax.Array] | None = None
  extra: Mapping[str, jax.Array] = types.MappingProxyType({})


# Of a network with an AdaptiveWeight the first result is {term: loss [B]}.
Loss = Callable[[Params, Context], tuple[Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
  """Weights of a loss's terms, taken from their gradients.

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
  """A trained network.

  Attributes:
    network: the Linen module.
    init: (key, images, labels) -> parameters.
    load_pretrained: (parameters of another run's network, fresh parameters) ->
      parameters to start from; raises ValueError where they do not fit. None
      takes them unchanged.
    init_from: name of the frozen network that it starts from where the run
      names no other; None starts fresh.
    project: parameters after an update -> parameters, such as forced weight
      normalisation; None leaves them.
    adaptive_weight: weights of the terms of its loss; None where the loss is
      one number per example.
  """

  network: nn.Module
  init: Callable[[jax.Array, jax.Array, jax.Array | None], Params]
  load_pretrained: Callable[[Params, Params], Params] | None = None
  init_from: str | None = None
  project: Callable[[Params], Params] | None = None
  adaptive_weight: AdaptiveWeight | None = None


@dataclasses.dataclass(frozen=True)
class Average:
  """A moving average that a method itself needs.

  It moves in steps that update its network, and only in those.

  Attributes:
    network: whose parameters are averaged.
    rate: key of the curriculum that holds the rate of a step.
  """

  network: str
  rate: str


class Method(Protocol):
  """Protocol of all methods.

  Attributes:
    networks: trained networks by name.
    losses: network -> (params, context) -> (loss [B], metrics of [B] each);
      pure, one per example, not averaged. With an AdaptiveWeight the first is
      {term: [B]}.
    averages: moving averages that the losses read.
    sampled_network: the network whose parameters `flow_map` takes.
    takes_end_time: whether the flow map takes any end level, or only
      sigma_min.
    supports_inversion: whether it also leads from images to noise.
    is_denoiser: whether it is Euler's step of a denoiser, which solvers may
      correct and guidance may change.
    sigma_min, sigma_max: levels between which the flow map is trained.
  """

  networks: Mapping[str, TrainableNetwork]
  losses: Mapping[str, Loss]
  averages: Mapping[str, Average]
  sampled_network: str
  takes_end_time: bool
  supports_inversion: bool
  is_denoiser: bool
  sigma_min: float
  sigma_max: float

  def phase(self, step: int) -> tuple[str, ...]:
    """Networks to update at a step; on the host, static, few values."""

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Every value that `phase` can take."""

  def curriculum(self, step: int) -> dict[str, Any]:
    """Scalars and arrays of a step, of shapes that never change."""

  def flow_map(self, params: Params) -> Callable[..., jax.Array]:
    """f(x, t, u, labels): all that samplers, editing and metrics see."""


class SingleNetworkMethod:
  """Phases and networks of a method that trains one network alone."""

  sampled_network = "student"
  supports_inversion = False
  is_denoiser = False

  @property
  def networks(self) -> Mapping[str, TrainableNetwork]:
    network = TrainableNetwork(
        self.network, self.init,
        load_pretrained=getattr(self, "load_pretrained", None),
        project=getattr(self.network, "project", None),
    )
    return {"student": network}

  @property
  def losses(self) -> Mapping[str, Loss]:
    return {"student": self.loss}

  def phase(self, step: int) -> tuple[str, ...]:
    del step
    return ("student",)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    return (("student",),)
