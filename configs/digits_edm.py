"""EDM's denoiser on 8x8 handwritten digits: the teacher of the distillations.

  python -m bcm_jax.main --config=configs/digits_edm.py --workdir=runs/edm

Two CPU cores, about 8 minutes; numbers: docs/methods.md.

The network of digits.py without its end level. What differs from EDM's CIFAR-10
settings, and why: sigma_data and sigma_max as in digits.py; p_mean, p_std
towards the levels where 8x8 images are decided; no augmentation.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve


def get_config() -> ml_collections.ConfigDict:
  """The config; every value can be set as --config.section.key=value."""
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
