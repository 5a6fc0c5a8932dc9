"""bcm_jax: few-step generative models in JAX.

Bidirectional consistency models and their relatives: one network
f(x, t, u) carries an image from noise level t to noise level u, in either
direction, in one call.
"""

__version__ = "0.1.0"
