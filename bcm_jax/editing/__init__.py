"""Real images in, edited ones out: bcm_jax.load and mode edit."""
