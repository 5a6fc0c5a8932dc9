"""Consistency distillation on 8x8 handwritten digits, from digits_edm.py.

  python -m bcm_jax.main --config=configs/digits_edm.py --workdir=runs/edm
  python -m bcm_jax.main --config=configs/digits_cd.py --workdir=runs/cd

Two CPU cores; time and numbers: docs/methods.md. Another teacher by
--config.method.teacher=DIR. Song et al.'s CIFAR-10 settings but for the rate
and the rates of averages, which a shorter run wants higher, and the distance:
iCT's, for LPIPS knows no images of 8x8.
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
      name="cd", teacher="runs/edm", sigma_data=0.75, sigma_max=40.0,
      metric="pseudo_huber",
  )
  config.training.num_steps = 8000
  config.sample = dict(times=(0.7,))
  config.eval.samplers = ("onestep", "cm_multistep")
  return config
