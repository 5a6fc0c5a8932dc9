"""Heads that tell real features of a U-Net's encoder from generated ones.

A head a level: 4x4 convolutions of stride 2 with norm and SiLU down to 4x4, one
of 4x4 without padding, and a last 1x1 to a logit; the head of DMD2 (Yin et al.,
2024, appendix F). On small features, fewer halvings and a smaller last kernel.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes
from bcm_jax.models import layers

# Sides of the features that the last convolution takes at a time.
_LAST = 4
_GROUPS = 32
_MIN_GROUP_CHANNELS = 4


class Head(nn.Module):
  """One logit an image, of features of one level.

  Attributes:
    features: channels inside; None is those of the input.
  """

  features: int | None = None

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B]."""
    width = self.features or h.shape[-1]
    h = dtypes.at_least_float32(h)

    def norm(h, name):
      return nn.silu(layers.group_norm(
          h, _GROUPS, _MIN_GROUP_CHANNELS, name=name
      ))

    number = 0
    while min(h.shape[1:3]) > _LAST:
      h = nn.Conv(width, (4, 4), 2, ((1, 1), (1, 1)), name=f"conv{number}")(h)
      h = norm(h, f"norm{number}")
      number += 1
    h = nn.Conv(width, h.shape[1:3], padding="VALID", name="last")(h)
    h = norm(h, "last_norm")
    return nn.Conv(1, (1, 1), name="logit")(h)[:, 0, 0, 0]


class Heads(nn.Module):
  """Heads on several levels.

  Attributes:
    levels: which of an encoder's levels, 0 the finest; empty is all.
    features: see Head.
  """

  levels: tuple[int, ...] = ()
  features: int | None = None

  @nn.compact
  def __call__(self, encoder: Sequence[jax.Array]) -> jax.Array:
    """Features [B, H, W, C] of all levels, fine to coarse -> [B, levels]."""
    chosen = self.levels or range(len(encoder))
    return jnp.stack([
        Head(self.features, name=f"level{i}")(encoder[i]) for i in chosen
    ], axis=-1)
