"""BCM fine-tuned from a consistency model, on 8x8 handwritten digits.

  python -m bcm_jax.main --config=configs/digits_ict.py --workdir=runs/ict
  python -m bcm_jax.main --config=configs/digits_bcm_finetune.py \
      --workdir=runs/finetune

Starts from the EMA of runs/ict (--config.training.init_from=DIR selects another
run) with an unchanged network output. N is constant, as in the published
fine-tuning. Results: docs/results.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve


def get_config() -> ml_collections.ConfigDict:
  """Returns the config of digits.py with constant N and initial weights."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.method.discretization = "fixed"
  config.training.init_from = "runs/ict"
  config.training.num_steps = config.training.num_steps // 2
  return config
