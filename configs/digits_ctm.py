"""CTM on 8x8 handwritten digits, distilled from digits_edm.py.

  python -m bcm_jax.main --config=configs/digits_edm.py --workdir=runs/edm
  python -m bcm_jax.main --config=configs/digits_ctm.py --workdir=runs/ctm
  python -m bcm_jax.main --config=configs/digits_ctm.py:gan --workdir=runs/gan

For two CPU cores; time and results: docs/methods.md. ':gan' continues from
runs/ctm with a discriminator, as in the official commands.
--config.method.teacher=DIR selects another teacher.
"""

import pathlib

import ml_collections

from bcm_jax.config import resolve

VARIANTS = ("dsm", "gan")


def get_config(variant: str = "dsm") -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  digits = pathlib.Path(__file__).with_name("digits.py")
  config = resolve.read_file(str(digits))
  config.model.end_branch = "blocks"
  config.method = dict(
      name="ctm", teacher="runs/edm", sigma_data=0.75, sigma_max=40.0,
      p_mean=-0.8, p_std=1.4,
  )
  config.training.num_steps = 1800  # Each has 12 solver steps on average.
  config.eval.samplers = ("onestep", "ancestral", "cm_multistep")
  if variant == "gan":
    config.method.gan = True
    config.auxiliary_optimizer = dict(learning_rate=2e-3, b1=0.5, b2=0.9)
    config.training.init_from = "runs/ctm"
  return config
