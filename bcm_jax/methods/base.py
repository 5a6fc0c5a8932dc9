"""What a method is: players, losses, phases, a curriculum and a flow map.

A method is a frozen dataclass of numbers and modules. It declares; the engine
in `training` does gradients, accumulation, averages, sharding and metrics.
"""

from collections.abc import Callable, Mapping
import dataclasses
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
  """

  images: jax.Array
  labels: jax.Array | None
  keys: Callable[[str], jax.Array]
  curriculum: Mapping[str, Any]
  players: Mapping[str, Params]
  averages: Mapping[str, Params]
  augment_labels: jax.Array | None = None


Loss = Callable[[Params, Context], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Player:
  """A trained network.

  Attributes:
    network: the Linen module.
    init: (key, images, labels) -> parameters.
    adapt: (parameters of another run's network, fresh parameters) ->
      parameters to start from; raises ValueError where they do not fit. None
      takes them unchanged.
    project: parameters after an update -> parameters, such as forced weight
      normalisation; None leaves them.
  """

  network: nn.Module
  init: Callable[[jax.Array, jax.Array, jax.Array | None], Params]
  adapt: Callable[[Params, Params], Params] | None = None
  project: Callable[[Params], Params] | None = None


@dataclasses.dataclass(frozen=True)
class Average:
  """A moving average that a method itself needs.

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
      pure, an example at a time, not averaged.
    averages: moving averages that the losses read.
    sampled: the player whose parameters `flow_map` takes.
    two_time: whether the flow map takes any end level, or sigma_min alone.
    sigma_min, sigma_max: levels between which the flow map is trained.
  """

  players: Mapping[str, Player]
  losses: Mapping[str, Loss]
  averages: Mapping[str, Average]
  sampled: str
  two_time: bool
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

  @property
  def players(self) -> Mapping[str, Player]:
    player = Player(
        self.network, self.init, getattr(self, "adapt", None),
        getattr(self.network, "project", None),
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
