"""Figures of training runs: python -m bcm_jax.plots RUN..."""
