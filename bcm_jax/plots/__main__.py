"""The command python -m bcm_jax.plots."""

from bcm_jax.plots import draw
from bcm_jax.utils import cli

if __name__ == "__main__":
  cli.quiet_tensorflow()
  draw.main()
