"""Consistency distillation on 8x8 handwritten digits, from digits_edm.py.

  python -m bcm_jax.main --config=configs/digits_edm.py --workdir=runs/edm
  python -m bcm_jax.main --config=configs/digits_cd.py --workdir=runs/cd

For two CPU cores; time and results: docs/methods.md.
--config.method.teacher=DIR selects another teacher. The CIFAR-10 settings of
Song et al. (2023), except for a higher learning rate and a lower EMA rate for
the shorter run, the target network of their ImageNet-64 settings, and iCT's
distance, because LPIPS does not support 8x8 images.
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
      name="cd", teacher="runs/edm", sigma_data=0.75, sigma_max=40.0,
      metric="pseudo_huber", target_mu0=0.95,
  )
  config.training.num_steps = 8000
  config.sample = dict(times=(0.7,))
  config.eval.samplers = ("onestep", "cm_multistep")
  return config
