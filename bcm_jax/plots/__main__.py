"""The command python -m bcm_jax.plots."""

from bcm_jax import command
from bcm_jax.plots import draw

if __name__ == "__main__":
  command.quiet_tensorflow()
  draw.main()
