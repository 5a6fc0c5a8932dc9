"""Improved consistency training on 8x8 handwritten digits.

  python -m bcm_jax.main --config=configs/digits_ict.py --workdir=runs/ict

The initialization of digits_bcm_finetune.py: the same network without the
end-level embedding. A consistency model generates but does not invert images.
Results: docs/results.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of digits.py with iCT instead of BCM."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.model.two_time = False
  config.method.name = "ict"
  del config.method["bidirectional_weight"]
  config.eval.samplers = ("onestep", "cm_multistep")
  return config
