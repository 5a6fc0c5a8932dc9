"""BCM fine-tuned from a consistency model, on 8x8 handwritten digits.

  python -m bcm_jax.main --config=configs/digits_ict.py --workdir=runs/ict
  python -m bcm_jax.main --config=configs/digits_bcm_finetune.py \
      --workdir=runs/finetune

Starts from the moving average of the run in runs/ict (another one by
--config.training.init_from=DIR), with the network output unchanged; N is
constant, as in the published fine-tuning. Results: docs/results.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve


def get_config() -> ml_collections.ConfigDict:
  """The config of digits.py at its last N, from a checkpoint."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.method.discretization = "fixed"
  config.training.init_from = "runs/ict"
  config.training.num_steps = config.training.num_steps // 2
  return config
