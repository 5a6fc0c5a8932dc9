"""GAN discriminator heads on the encoder features of a U-Net.

One head per level, as in DMD2 (Yin et al., 2024, appendix F): 4x4 convolutions
with stride 2, norm and SiLU down to 4x4, a 4x4 convolution without padding, and
a 1x1 convolution to one logit. Small features use fewer strided convolutions
and a smaller last kernel.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes
from bcm_jax.models import layers

# Maximum kernel size of the last convolution.
_LAST = 4
_GROUPS = 32
_MIN_GROUP_CHANNELS = 4


class Head(nn.Module):
  """Discriminator head on the features of one level.

  Attributes:
    features: hidden channels; None uses those of the input.
  """

  features: int | None = None

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Computes logits [B] of features [B, H, W, C]."""
    width = self.features or h.shape[-1]
    h = dtypes.at_least_float32(h)

    def norm(h, name):
      return nn.silu(layers.group_norm(
          h, _GROUPS, _MIN_GROUP_CHANNELS, name=name
      ))

    index = 0
    while min(h.shape[1:3]) > _LAST:
      h = nn.Conv(width, (4, 4), 2, ((1, 1), (1, 1)), name=f"conv{index}")(h)
      h = norm(h, f"norm{index}")
      index += 1
    h = nn.Conv(width, h.shape[1:3], padding="VALID", name="last")(h)
    h = norm(h, "last_norm")
    return nn.Conv(1, (1, 1), name="logit")(h)[:, 0, 0, 0]


class Heads(nn.Module):
  """Discriminator heads on several levels.

  Attributes:
    levels: indices of encoder levels, 0 is the finest; empty selects all.
    features: hidden channels, see `Head`.
  """

  levels: tuple[int, ...] = ()
  features: int | None = None

  @nn.compact
  def __call__(self, encoder: Sequence[jax.Array]) -> jax.Array:
    """Computes logits [B, levels] of encoder features.

    Args:
      encoder: features [B, H, W, C] of all levels, fine to coarse.
    """
    levels = self.levels or range(len(encoder))
    return jnp.stack([
        Head(self.features, name=f"level{i}")(encoder[i]) for i in levels
    ], axis=-1)
