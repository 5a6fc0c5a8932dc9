"""Classifier-free guidance and autoguidance.

  D_w = D_0 + w (D_1 - D_0)

D_1 is the class-conditional denoiser. D_0 is the same network without the
class (classifier-free guidance; Ho & Salimans, 2022) or a smaller or less
trained network with the class (autoguidance; Karras et al., 2024). w = 1
disables guidance. A flow map given by Euler's step is affine in its denoiser,
so the formula also holds for flow maps; the wrappers accept both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Map = Callable[..., jax.Array]


def guided(main: Map, guide: Map, weight: float) -> Map:
  """Returns the guided map D_w = guide + w (main - guide).

  Args:
    main: D_1, function (x [B, ...], levels [B] ..., labels [B]) -> [B, ...].
    guide: D_0, with the same arguments.
    weight: guidance weight w.
  """

  def guided_map(*args):
    d1, d0 = main(*args), guide(*args)
    return d0 + weight * (d1 - d0)

  return guided_map


def without_class(main: Map) -> Map:
  """Returns the unconditional map: the last argument, labels, becomes -1."""

  def unconditional(*args):
    *rest, labels = args
    return main(*rest, jnp.full_like(labels, -1))

  return unconditional
