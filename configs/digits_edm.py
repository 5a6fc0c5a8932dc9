"""EDM on 8x8 handwritten digits, the teacher of the distillations.

  python -m bcm_jax.main --config=configs/digits_edm.py --workdir=runs/edm

About 8 minutes on two CPU cores; results: docs/methods.md.

The network of digits.py without the end-level embedding. Differences from EDM's
CIFAR-10 settings: sigma_data and sigma_max as in digits.py; p_mean and p_std
shifted towards the levels that determine 8x8 images; no augmentation.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.model.two_time = False
  config.method = dict(
      name="edm", sigma_data=0.75, sigma_max=40.0, p_mean=-0.8, p_std=1.4
  )
  config.optimizer.name = "adam"
  config.training.num_steps = 4000
  config.training.batch_size = 128
  config.sample = dict(sampler="heun", num_levels=12)
  config.eval.samplers = ("heun",)
  return config
