"""DiffAugment: what a discriminator sees of images, real and generated alike.

Zhao et al. (2020), as StyleGAN-XL's projected discriminator does it: colour,
translation and cutout, all differentiable, with draws of each image's own.
"""

import jax
import jax.numpy as jnp

# Shift by up to an eighth of the side, a square of a fifth of it cut out.
_TRANSLATION, _CUTOUT = 0.125, 0.2


def augment(images: jax.Array, keys: jax.Array) -> jax.Array:
  """Augments [B, H, W, C] in [-1, 1] by keys [B]; colours may leave it."""
  return jax.vmap(_one)(images, keys)


def _one(image, key):
  keys = jax.random.split(key, 3)
  return _cutout(_translate(_colour(image, keys[0]), keys[1]), keys[2])


def _colour(image, key):
  """Brightness, saturation about each grey, contrast about the image's mean."""
  u = jax.random.uniform(key, (3,), image.dtype)
  image = image + u[0] - 0.5
  grey = image.mean(axis=-1, keepdims=True)
  image = grey + 2 * u[1] * (image - grey)
  mean = image.mean()
  return mean + (0.5 + u[2]) * (image - mean)


def _translate(image, key):
  """Shifts by whole pixels; zeros come in."""
  height, width, _ = image.shape
  most = [round(_TRANSLATION * n) for n in (height, width)]
  padded = jnp.pad(image, [(most[0],) * 2, (most[1],) * 2, (0, 0)])
  shift = jax.random.randint(
      key, (2,), 0, 2 * jnp.asarray(most, jnp.int32) + 1
  )
  return jax.lax.dynamic_slice(padded, (*shift, 0), image.shape)


def _cutout(image, key):
  """Zeros in a square that is centred anywhere; edges may cut it."""
  height, width, _ = image.shape
  sizes = jnp.asarray([round(_CUTOUT * n) for n in (height, width)], jnp.int32)
  ends = jnp.asarray([height, width], jnp.int32) + (1 - sizes % 2)
  low = jax.random.randint(key, (2,), 0, ends) - sizes // 2
  rows, columns = jnp.arange(height), jnp.arange(width)
  inside = (
      ((rows >= low[0]) & (rows < low[0] + sizes[0]))[:, None]
      & ((columns >= low[1]) & (columns < low[1] + sizes[1]))[None, :]
  )
  return jnp.where(inside[..., None], 0, image)
