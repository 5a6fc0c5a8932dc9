"""The config of the runs that are killed: the digits and a network of toys.

What is proved is the loop's, not the network's; this one is traced in half a
second. It has dropout, labels, a moving average and a rising curriculum, so
that every stream of noise and every part of the state matters.
"""

import ml_collections

from bcm_jax.config import registry
from bcm_jax.diffusion import preconditioning
from tests import toys

STEPS = 12
EVERY = 4


class Network(toys.MLP):
  """The toy with the keys that a config of images must have."""

  width: int = 32
  model_channels: int = 8
  channel_mult: tuple[int, ...] = (1,)
  out_channels: int = 1
  dtype: str = "float32"


def register() -> None:
  """Makes the network known to configs by the name 'toy'."""
  registry.MODELS["toy"] = registry.Model(
      Network, c_noise_scale=preconditioning.ADM_SCALE
  )


def get_config() -> ml_collections.ConfigDict:
  """The config; every value can be set as --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = dict(name="digits")
  config.model = dict(name="toy", dropout=0.1, num_classes=10)
  config.method = dict(name="bcm", sigma_max=40.0, s0=4, s1=32)
  config.optimizer = dict(name="radam", learning_rate=1e-2)
  config.training = dict(
    num_steps=STEPS,
    batch_size=16,
    ema_rates=(0.9,),
    watchdog_timeout_secs=120.0,
  )
  config.parallel = dict(cpu_devices=2, heartbeat_secs=10)
  config.checkpoint = dict(every_steps=EVERY, keep=None, retry_secs=0.1)
  config.log = dict(every_steps=1)
  config.sample = dict(times=(0.7,))
  config.eval = dict(at_end=False)
  return config
