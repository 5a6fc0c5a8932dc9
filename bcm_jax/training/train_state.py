"""The training state: all that a run is, beside its config and its step."""

from collections.abc import Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from bcm_jax.methods import base
from bcm_jax.training import ema
from bcm_jax.training import rng


@struct.dataclass
class NetworkState:
  """One trained network.

  Attributes:
    params: its parameters.
    opt_state: state of its optimiser.
    num_updates: number of updates that went through; int32 scalar.
  """

  params: Any
  opt_state: Any
  num_updates: jax.Array


@struct.dataclass
class TrainState:
  """Everything that affects the next step, but (seed, step, data).

  Attributes:
    step: number of finished steps; int32 scalar.
    data_offset: how far data and noise are ahead of the step, because
      roll-backs skipped some: step k takes those of position
      k + data_offset; int32 scalar.
    networks: trained networks by name.
    averages: moving averages of parameters by name.
    skipped: steps whose update was skipped as non-finite; int32 scalar.
    skipped_in_row: such steps since the last good one; int32 scalar.
    log2_loss_scale: losses are multiplied by 2 to this before they are
      differentiated; float32 scalar, None where float16 plays no part.
    frozen: parameters of networks that are not trained, by name; no checkpoint
      holds them.
  """

  step: jax.Array
  data_offset: jax.Array
  networks: dict[str, NetworkState]
  averages: dict[str, Any]
  skipped: jax.Array
  skipped_in_row: jax.Array
  log2_loss_scale: jax.Array | None = None
  frozen: dict[str, Any] = struct.field(default_factory=dict)

  def saved(self) -> "TrainState":
    """What a checkpoint holds."""
    return self.replace(frozen={})


# First scale; it falls by half at every overflow and grows slowly.
_LOG2_LOSS_SCALE = 16.0


def average_name(rate: float) -> str:
  """Name of the moving average of a rate, such as 'ema_0.999'."""
  return f"ema_{rate:g}"


def power_name(std: float) -> str:
  """Name of the power-function average of a length, such as 'power_0.05'."""
  return f"power_{std:g}"


def create(
    method: base.Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    ema_rates: tuple[float, ...],
    seed: int,
    images: jax.Array,
    labels: jax.Array | None,
    start_from: Mapping[str, Any] | None = None,
    loss_scaling: bool = False,
    ema_stds: tuple[float, ...] = (),
) -> TrainState:
  """Makes the state before the first step; pure, so it can be jitted.

  Args:
    method: declares networks and averages.
    optimizers: one for each network.
    ema_rates: rates of the averages of the sampled network.
    seed: run's seed.
    images: [b, H, W, C] of any b, for shapes.
    labels: [b] or None.
    start_from: network -> parameters of another run to start from.
    loss_scaling: scale losses, so that gradients survive float16.
    ema_stds: lengths of its power-function averages.

  Raises:
    ValueError: parameters to start from do not fit the network.
  """
  networks = {}
  for name, network in method.networks.items():
    key = rng.stream_key(seed, f"init/{name}")
    params = network.init(key, images, labels)
    if start_from and name in start_from:
      source, fresh = start_from[name], params
      params = source
      if network.load_pretrained is not None:
        params = network.load_pretrained(source, fresh)
      # Sampling, conversion and export omit these.
      params = {h: fresh[h] for h in network.heads} | dict(params)
      _check_fits(params, fresh)
    networks[name] = NetworkState(
        params, optimizers[name].init(params), jnp.int32(0)
    )
  names = [*map(average_name, ema_rates), *map(power_name, ema_stds)]
  averages = {
      name: ema.start(networks[method.sampled_network].params) for name in names
  }
  for name, average in method.averages.items():
    averages[name] = ema.start(networks[average.network].params)
  # Distinct arrays: a donated buffer must not appear twice.
  zero = [jnp.zeros((), jnp.int32) for _ in range(4)]
  scale = jnp.float32(_LOG2_LOSS_SCALE) if loss_scaling else None
  return TrainState(
      zero[0], zero[1], networks, averages, zero[2], zero[3], scale
  )


def roll_back(good: TrainState, position: int) -> TrainState:
  """A saved state that goes on with the data from `position` on.

  Args:
    good: what a checkpoint held.
    position: first batch that was not tried yet.
  """
  return good.replace(
      data_offset=jnp.int32(position - int(good.step)),
      skipped_in_row=jnp.zeros((), jnp.int32),
  )


def _check_fits(params: Any, fresh: Any) -> None:
  """Raises ValueError unless two trees have the same names and shapes."""
  here, there = (
      {
          jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      }
      for tree in (params, fresh)
  )
  differing = sorted(
      k for k in here.keys() | there.keys() if here.get(k) != there.get(k)
  )
  if differing:
    k = differing[0]
    raise ValueError(
        f"{len(differing)} tensors do not fit, the first {k}: "
        f"{here.get(k)} there, {there.get(k)} here"
    )
