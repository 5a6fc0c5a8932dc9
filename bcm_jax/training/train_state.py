"""The training state: networks, optimizer states, averages and counters."""

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
    params: parameters.
    opt_state: state of the optimizer.
    num_updates: number of updates applied; int32 scalar.
  """

  params: Any
  opt_state: Any
  num_updates: jax.Array


@struct.dataclass
class TrainState:
  """The training state.

  With the seed and the data it determines the next step.

  Attributes:
    step: number of finished steps; int32 scalar.
    data_offset: step k uses the batch and noise of position k + data_offset;
      greater than 0 after rollbacks, which skip data; int32 scalar.
    networks: trained networks by name.
    averages: moving averages of parameters by name.
    skipped: number of steps whose update was skipped as non-finite; int32
      scalar.
    skipped_in_row: skipped steps since the last finite step; int32 scalar.
    log2_loss_scale: log2 of the loss scale of mixed-precision training; float32
      scalar, None without float16.
    frozen: parameters of networks that are not trained, by name; not saved in
      checkpoints.
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
    """Returns the part of the state that a checkpoint contains."""
    return self.replace(frozen={})


# Initial loss scale (log2); an overflow halves it, see train_step.
_LOG2_LOSS_SCALE = 16.0


def average_name(rate: float) -> str:
  """Returns the name of an EMA by its rate, such as 'ema_0.999'."""
  return f"ema_{rate:g}"


def phema_name(std: float) -> str:
  """Returns the name of a power-function EMA by its sigma_rel: 'phema_0.05'."""
  return f"phema_{std:g}"


def halflife_name(kimg: float) -> str:
  """Returns the name of an EMA by its half-life: 'ema_500kimg'."""
  return f"ema_{kimg:g}kimg"


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
    ema_halflife_kimg: tuple[float, ...] = (),
) -> TrainState:
  """Creates the state before the first step; a pure function, can be jitted.

  Args:
    method: declares networks and averages.
    optimizers: network -> optimizer.
    ema_rates: decay rates of the EMAs of the sampled network.
    seed: seed of the run.
    images: [b, H, W, C] of any b; only the shape matters.
    labels: [b] or None.
    start_from: network -> parameters to start from.
    loss_scaling: whether to scale losses, for float16.
    ema_stds: sigma_rel of the power-function EMAs of the sampled network.
    ema_halflife_kimg: half-lives of its other EMAs.

  Raises:
    ValueError: parameters in start_from do not fit the network.
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
      # Converted and exported parameters have no heads.
      params = {h: fresh[h] for h in network.heads} | dict(params)
      _check_fits(params, fresh)
    networks[name] = NetworkState(
        params, optimizers[name].init(params), jnp.int32(0)
    )
  names = [
      *map(average_name, ema_rates), *map(phema_name, ema_stds),
      *map(halflife_name, ema_halflife_kimg),
  ]
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
  """Returns a saved state that continues with other data.

  Args:
    good: state of a checkpoint.
    position: position of the first batch that has not been used.
  """
  return good.replace(
      data_offset=jnp.int32(position - int(good.step)),
      skipped_in_row=jnp.zeros((), jnp.int32),
  )


def _check_fits(params: Any, fresh: Any) -> None:
  """Raises ValueError unless two trees have the same names and shapes."""
  fresh_shapes, shapes = (
      {
          jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      }
      for tree in (fresh, params)
  )
  differing = sorted(
      k for k in shapes.keys() | fresh_shapes.keys()
      if shapes.get(k) != fresh_shapes.get(k)
  )
  if differing:
    k = differing[0]
    raise ValueError(
        f"{len(differing)} tensors do not fit, the first is {k}: got shape "
        f"{shapes.get(k)}, expected {fresh_shapes.get(k)}"
    )
