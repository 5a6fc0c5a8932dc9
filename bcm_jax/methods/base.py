"""What a method is: players, losses, phases, a curriculum and a flow map.

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
  """What a loss may read beside its own player's parameters.

  Attributes:
    images: [B, H, W, C] float in [-1, 1].
    labels: [B] int32, or None.
    keys: stream name -> [B] keys, one an example. A stream's keys depend on
      (seed, stream, step, position in the global batch) alone.
    curriculum: numbers and tables of `Method.curriculum(step)`.
    players: parameters of every player, stop-gradiented.
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
  players: Mapping[str, Params]
  averages: Mapping[str, Params]
  augment_labels: jax.Array | None = None
  index: jax.Array | None = None
  frozen: Mapping[str, Params] = types.MappingProxyType({})
  shared_key: Callable[[str], jax.Array] | None = None
  extra: Mapping[str, jax.Array] = types.MappingProxyType({})


# Of a player with a Balance the first result is {term: loss [B]}.
Loss = Callable[[Params, Context], tuple[Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class Balance:
  """Weights of a loss's terms, taken from their gradients.

  The norms are of gradients of the mean over the global batch, so weights do
  not depend on devices, hosts or microbatches.

  Attributes:
    terms: names of the terms.
    leaf: gradient of all parameters -> the tensor whose norm counts.
    weigh: {term: norm}, scalars -> {term: weight}, scalars.
  """

  terms: tuple[str, ...]
  leaf: Callable[[Params], jax.Array]
  weigh: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Player:
  """A trained network.

  Attributes:
    network: the Linen module.
    init: (key, images, labels) -> parameters.
    adapt: (parameters of another run's network, fresh parameters) ->
      parameters to start from; raises ValueError where they do not fit. None
      takes them unchanged.
    starts_from: name of the frozen network that it starts from where the run
      names no other; None starts fresh.
    project: parameters after an update -> parameters, such as forced weight
      normalisation; None leaves them.
    balance: how the terms of its loss are weighed; None where the loss is one
      number an example.
  """

  network: nn.Module
  init: Callable[[jax.Array, jax.Array, jax.Array | None], Params]
  adapt: Callable[[Params, Params], Params] | None = None
  starts_from: str | None = None
  project: Callable[[Params], Params] | None = None
  balance: Balance | None = None


@dataclasses.dataclass(frozen=True)
class Average:
  """A moving average that a method itself needs.

  It moves in steps that update its player, and only in those.

  Attributes:
    player: whose parameters are averaged.
    rate: key of the curriculum that holds the rate of a step.
  """

  player: str
  rate: str


class Method(Protocol):
  """Protocol of all methods.

  Attributes:
    players: trained networks by name.
    losses: player -> (params, context) -> (loss [B], metrics of [B] each);
      pure, an example at a time, not averaged. A loss with a Balance returns
      {term: [B]} in place of the first.
    averages: moving averages that the losses read.
    sampled: the player whose parameters `flow_map` takes.
    two_time: whether the flow map takes any end level, or sigma_min alone.
    inverts: whether it also leads from images to noise.
    solves: whether it is Euler's step of a denoiser, which solvers may correct
      and guides may push.
    sigma_min, sigma_max: levels between which the flow map is trained.
  """

  players: Mapping[str, Player]
  losses: Mapping[str, Loss]
  averages: Mapping[str, Average]
  sampled: str
  two_time: bool
  inverts: bool
  solves: bool
  sigma_min: float
  sigma_max: float

  def phase(self, step: int) -> tuple[str, ...]:
    """Players to update at a step; on the host, static, few values."""

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Every value that `phase` can take."""

  def curriculum(self, step: int) -> dict[str, Any]:
    """Scalars and arrays of a step, of shapes that never change."""

  def flow_map(self, params: Params) -> Callable[..., jax.Array]:
    """f(x, t, u, labels): all that samplers, editing and metrics see."""


class OnePlayer:
  """Phases and players of a method that trains one network alone."""

  sampled = "student"
  inverts = False
  solves = False

  @property
  def players(self) -> Mapping[str, Player]:
    player = Player(
        self.network, self.init, adapt=getattr(self, "adapt", None),
        project=getattr(self.network, "project", None),
    )
    return {"student": player}

  @property
  def losses(self) -> Mapping[str, Loss]:
    return {"student": self.loss}

  def phase(self, step: int) -> tuple[str, ...]:
    del step
    return ("student",)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    return (("student",),)
