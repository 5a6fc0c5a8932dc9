"""A studio in the browser: python -m bcm_jax.studio [CHECKPOINT]."""
