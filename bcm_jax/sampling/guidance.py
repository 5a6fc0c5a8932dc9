"""Guidance: one denoiser is pushed away from another.

  D_w = D_0 + w (D_1 - D_0)

with D_1 the network itself and D_0 the same without its class (classifier-free
guidance; Ho & Salimans, 2022), or a smaller or less trained network with it
(autoguidance; Karras et al., 2024). w = 1 is no guidance. A flow map that is
Euler's step is affine in its denoiser, so the same holds for it; the wrappers
take either.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Map = Callable[..., jax.Array]


def guided(main: Map, guide: Map, weight: float) -> Map:
  """w main + (1 - w) guide.

  Args:
    main: D_1, of arguments (x, levels ..., labels).
    guide: D_0, of the same.
    weight: w.
  """

  def both(*args):
    a, b = main(*args), guide(*args)
    return b + weight * (a - b)

  return both


def without_class(main: Map) -> Map:
  """The map for no class, label -1; labels are its last argument."""

  def unconditional(*args):
    *rest, labels = args
    return main(*rest, jnp.full_like(labels, -1))

  return unconditional
