"""Frozen random mixing of features of several levels.

The feature mixing of projected GANs (Sauer et al., 2021), as in CTM's released
discriminator: a random 1x1 convolution on every level, and, from coarse to
fine, the sum with what comes from below, enlarged, through another one. A
discriminator then cannot live on a few channels alone. There every level is
enlarged once more at the end; here it keeps its size.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

# Channels of the finest level; every coarser one has twice as many.
_WIDTH = 64


class Projection(nn.Module):
  """The two mixings; its parameters are drawn once and never trained."""

  @nn.compact
  def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
    """Features [B, H, W, C] of all levels, fine to coarse -> as many."""

    def mix(h, width, name):
      init = nn.initializers.he_normal()
      return nn.Conv(width, (1, 1), kernel_init=init, name=name)(h)

    own = [
        mix(h, _WIDTH * 2**i, f"channels{i}") for i, h in enumerate(features)
    ]
    mixed, below = [], None
    for i in reversed(range(len(own))):
      h = own[i]
      if below is not None:
        shape = (*h.shape[:3], below.shape[-1])
        h = h + jax.image.resize(below, shape, "bilinear")
      # The finest keeps its width; others take that of the level above.
      below = mix(h, _WIDTH * 2 ** max(i - 1, 0), f"scales{i}")
      mixed.insert(0, below)
    return mixed
