"""DMD and DMD2 on 8x8 handwritten digits, distilled from digits_edm.py.

  python -m bcm_jax.main --config=configs/digits_edm.py --workdir=runs/edm
  python -m bcm_jax.main --config=configs/digits_dmd.py --workdir=runs/dmd2

DMD (without 2) requires teacher pairs:

  python -m bcm_jax.main --workdir=runs/edm --mode=pairs \
      --config.sample.num_samples=10000
  python -m bcm_jax.main --config=configs/digits_dmd.py:dmd --workdir=runs/dmd

For two CPU cores; time and results: docs/methods.md. ':no_gan' is DMD2 without
the discriminator. --config.method.teacher=DIR selects another teacher. The
learning rates are ours; no settings for CIFAR-10 or smaller images are
published.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve

VARIANTS = ("dmd2", "no_gan", "dmd")


def get_config(variant: str = "dmd2") -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.model.two_time = False
  config.method = dict(
      name="dmd" if variant == "dmd" else "dmd2", teacher="runs/edm",
      sigma_data=0.75, sigma_max=40.0,
  )
  if variant == "no_gan":
    config.method.gan_weight = 0.0
  if variant == "dmd":
    config.data.pairs = "runs/edm/pairs.npz"
  config.optimizer = dict(
      name="adamw", learning_rate=2e-4, weight_decay=0.01, grad_clip=10.0,
      warmup_steps=50,
  )
  # A DMD step includes both updates and costs as much as two DMD2 steps.
  config.training.num_steps = 4500 if variant == "dmd" else 6000
  config.eval.samplers = ("onestep",)
  return config
