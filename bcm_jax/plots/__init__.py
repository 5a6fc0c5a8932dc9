"""Figures of what runs wrote: python -m bcm_jax.plots RUN..."""
