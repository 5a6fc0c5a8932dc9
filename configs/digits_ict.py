"""Improved consistency training on 8x8 handwritten digits.

  python -m bcm_jax.main --config=configs/digits_ict.py --workdir=runs/ict

The start of digits_bcm_finetune.py: the same network, but for the second time
branch, which a consistency model does not have. It generates; it cannot
invert. Results: docs/results.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve


def get_config() -> ml_collections.ConfigDict:
  """The config of digits.py with iCT in place of BCM."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.model.two_time = False
  config.method.name = "ict"
  del config.method["bidirectional_weight"]
  config.eval.samplers = ("onestep", "cm_multistep")
  return config
