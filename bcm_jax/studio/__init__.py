"""Web interface for sampling and editing: python -m bcm_jax.studio."""
