"""What of an image is known, and how it is put back into another one.

Each `keep_*` takes images x and known ones [B, H, W, C] in any range and
returns, of all images that have the known part, the one nearest to x: an
orthogonal projection P of x, to x + P (known - x). Song et al. (CM, 2023),
section 5 and algorithm 4, write the same with an orthogonal basis whose first
vector spans the known part.
"""

import math

import jax
import jax.numpy as jnp

# Luma of ITU-R BT.601, as CM's released code weighs red, green and blue.
LUMA = (0.2989, 0.5870, 0.1140)


def keep_pixels(x: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
  """Pixels of `known` where mask is 1 and of x where it is 0, to the bit.

  Args:
    x, known: [B, H, W, C], finite.
    mask: [B, H, W, 1] in [0, 1]; between 0 and 1 both are mixed.
  """
  return mask * known + (1 - mask) * x


def keep_grey(x: jax.Array, known: jax.Array) -> jax.Array:
  """The luma of `known` [B, H, W, 3], which may be a grey image in three
  channels, with the colours of x."""
  luma = jnp.asarray(LUMA, x.dtype)
  along = jnp.einsum("bhwc,c->bhw", known - x, luma) / jnp.sum(luma**2)
  return x + along[..., None] * luma


def keep_means(x: jax.Array, known: jax.Array, size: int) -> jax.Array:
  """The means over blocks of size x size of `known`, with the details of x."""
  return x + enlarge(shrink(known - x, size), size)


def to_grey(x: jax.Array) -> jax.Array:
  """The luma of images [B, H, W, 3], in three equal channels."""
  luma = jnp.asarray(LUMA, x.dtype)
  grey = jnp.einsum("bhwc,c->bhw", x, luma / luma.sum())
  return jnp.broadcast_to(grey[..., None], x.shape)


def shrink(x: jax.Array, size: int) -> jax.Array:
  """Means over blocks: [B, H, W, C] -> [B, H / size, W / size, C]."""
  b, h, w, c = x.shape
  blocks = x.reshape(b, h // size, size, w // size, size, c)
  return blocks.mean(axis=(2, 4))


def enlarge(x: jax.Array, size: int) -> jax.Array:
  """Every pixel becomes a block: [B, H, W, C] -> [B, size H, size W, C]."""
  return x.repeat(size, axis=1).repeat(size, axis=2)


def feather(mask: jax.Array, width: float) -> jax.Array:
  """A mask [B, H, W, 1] that fades to 0 towards its holes.

  Blurred by a Gaussian of standard deviation `width` pixels where it is 1, and
  0 in the holes as before; width 0 changes nothing.
  """
  if not width:
    return mask
  radius = math.ceil(3 * width)
  offsets = jnp.arange(-radius, radius + 1)
  kernel = jnp.exp(-0.5 * (offsets / width) ** 2)
  kernel = kernel / kernel.sum()
  blurred = mask
  for axis in (1, 2):
    pads = [(0, 0)] * mask.ndim
    pads[axis] = (radius, radius)
    padded, size = jnp.pad(blurred, pads, mode="edge"), mask.shape[axis]
    blurred = sum(
        weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
        for i, weight in enumerate(kernel)
    )
  return mask * blurred
