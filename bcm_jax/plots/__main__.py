"""Draws figures of runs: python -m bcm_jax.plots."""

from bcm_jax.plots import draw

if __name__ == "__main__":
  draw.main()
