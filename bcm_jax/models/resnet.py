"""Small residual network for classification and image features.

Pre-activation blocks (He et al., "Identity Mappings in Deep Residual
Networks", 2016, figure 4e) with group normalization (Wu and He, "Group
Normalization", 2018) instead of batch normalization, so that the features of an
image do not depend on the batch and the only state is the parameters.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from bcm_jax.models import layers

# (Maximum number of groups, minimum channels per group).
_GROUPS = (8, 4)


class Block(nn.Module):
  """Pre-activation residual block with a zero-initialized last convolution.

  shortcut(x) + conv1(relu(norm1(conv0(relu(norm0(x)))))).

  Attributes:
    features: output channels; a multiple of 8, at least 32.
    stride: stride of conv0 and of the shortcut.
  """

  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = nn.relu(layers.group_norm(x, *_GROUPS, name="norm0"))
    if self.stride > 1 or x.shape[-1] != self.features:
      x = layers.conv(h, self.features, 1, stride=self.stride, name="shortcut")
    h = layers.conv(h, self.features, 3, stride=self.stride, name="conv0")
    h = nn.relu(layers.group_norm(h, *_GROUPS, name="norm1"))
    return x + layers.conv(h, self.features, 3, zero=True, name="conv1")


class ResNet(nn.Module):
  """Residual network; each stage halves the resolution.

  Attributes:
    num_classes: number of logits.
    widths: channels of each stage, multiples of 8 and at least 32; the last one
      is the number of features.
    blocks: residual blocks per stage.
    stem_stride: stride of the first convolution.
  """

  num_classes: int
  widths: Sequence[int] = (32, 64, 128)
  blocks: int = 1
  stem_stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes features [B, widths[-1]] and logits [B, num_classes].

    Args:
      x: float [B, H, W, C] in 0..255.
    """
    # Covers every pixel, including the edges.
    kernel = max(3, 2 * self.stem_stride - 1)
    x = layers.conv(
        x / 127.5 - 1, self.widths[0], kernel, stride=self.stem_stride,
        name="stem",
    )
    for stage, width in enumerate(self.widths):
      for i in range(self.blocks):
        stride = 2 if stage and not i else 1
        x = Block(width, stride, name=f"stage{stage}_block{i}")(x)
    x = nn.relu(layers.group_norm(x, *_GROUPS, name="norm"))
    features = x.mean(axis=(1, 2))
    return features, layers.linear(features, self.num_classes, name="logits")


def for_images(
    image_shape: tuple[int, int, int], num_classes: int
) -> ResNet:
  """Returns a network for images of at least 8x8 pixels and a few CPU cores.

  The stem reduces larger images to about 16x16, because a step at 32x32 costs
  four times as much. Images below 16x16 omit the first stage.

  Args:
    image_shape: (H, W, C).
    num_classes: number of logits.
  """
  side = min(image_shape[:2])
  widths = ResNet.widths if side >= 16 else ResNet.widths[1:]
  return ResNet(num_classes, widths, stem_stride=max(1, side // 16))
