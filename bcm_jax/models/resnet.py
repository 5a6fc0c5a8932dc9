"""A small residual network that classifies images and gives features of them.

Pre-activation blocks (He et al., "Identity Mappings in Deep Residual
Networks", 2016, figure 4e) with group normalisation (Wu and He, "Group
Normalization", 2018) in place of batch normalisation: an image's features then
depend on no other image, and there is no state but the parameters.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from bcm_jax.models import layers

# Most groups of a norm, fewest channels of a group.
_GROUPS = (8, 4)


class Block(nn.Module):
  """shortcut(x) + conv1(relu(norm1(conv0(relu(norm0(x)))))); conv1 from zero.

  Attributes:
    features: output channels, a multiple of 8 from 32 on.
    stride: of conv0 and the shortcut.
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
  """Stages of residual blocks, each at half the resolution of the one before.

  Attributes:
    num_classes: number of logits.
    widths: channels of each stage, multiples of 8 from 32 on; the last is the
      number of features.
    blocks: residual blocks a stage.
    stem_stride: of the first convolution.
  """

  num_classes: int
  widths: Sequence[int] = (32, 64, 128)
  blocks: int = 1
  stem_stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features [B, widths[-1]] and logits [B, num_classes].

    Args:
      x: float [B, H, W, C] in 0..255.
    """
    # Wide enough that every pixel is seen, at the edges too.
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
  """A network that suits images [H, W, C] of 8x8 or more, and a few cores.

  The stem brings larger images to about 16x16: at 32x32 a step would cost four
  times as much. Images below 16x16 start at the second stage's width.
  """
  side = min(image_shape[:2])
  widths = ResNet.widths if side >= 16 else ResNet.widths[1:]
  return ResNet(num_classes, widths, stem_stride=max(1, side // 16))
