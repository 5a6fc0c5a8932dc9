"""Non-leaky augmentation with conditioning on the augmentation parameters.

The augmentation pipeline of EDM (Karras et al., "Elucidating the Design Space
of Diffusion-Based Generative Models", 2022, appendix F.2). Each of six
geometric transforms is applied with a small probability, and nine augmentation
labels that describe the transforms condition the network. Sampling uses labels
of zero, that is, no augmentation. The resampling follows Karras et al.,
"Training Generative Adversarial Networks with Limited Data" (2020); see `warp`.

`draw` and `apply` are pure, and the randomness of an example depends only on
its own key. The official code pads by the largest margin that a transform in
the batch requires, so an image depends on the rest of its batch. Here the
margin is always the maximum; the outputs differ by less than 1e-4, even for
noise images.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.data import warp
from bcm_jax.errors import UserError
from bcm_jax.models import dtypes

LABEL_DIM = 9

# Transform -> (its label columns, its random numbers in the order in which the
# official code draws them). Each number is a field of `Draws` or 'gate'.
_TRANSFORMS = {
    "xflip": ((0,), ("xflip", "gate")),
    "yflip": ((1,), ("yflip", "gate")),
    "scale": ((2,), ("scale", "gate")),
    "rotate_frac": ((3, 4), ("angle", "gate")),
    "aniso": ((5, 6), ("aniso", "aniso_angle", "gate", "aniso_coin")),
    "translate_frac": ((7, 8), ("shift", "gate")),
}
_GEOMETRIC = tuple(_TRANSFORMS)[2:]
# The same of the transforms that the paper does not use; fields of `MoreDraws`.
_MORE = {
    "rotate_int": ((9, 10), ("quarters", "gate")),
    "translate_int": ((11, 12), ("shift_int", "gate")),
    "brightness": ((13,), ("brightness", "gate")),
    "contrast": ((14,), ("contrast", "gate")),
    "lumaflip": ((15,), ("lumaflip", "gate")),
    "hue": ((16, 17), ("hue", "gate")),
    "saturation": ((18,), ("saturation", "gate")),
}
_COLORS = tuple(_MORE)[2:]
# All transforms in the official order.
_ORDER = ("xflip", "yflip", *tuple(_MORE)[:2], *_GEOMETRIC, *_COLORS)


@dataclasses.dataclass(frozen=True)
class AugmentPipe:
  """Augmentation settings, with the names and defaults of the official code.

  A transform is applied with probability min(1, p * multiplier); a flip then
  also requires a fair coin. Multipliers default to 0 (off); `training_pipe`
  returns the settings of the paper.

  Attributes:
    p: probability of a transform whose multiplier is 1.
    xflip: multiplier of mirroring left to right.
    yflip: multiplier of mirroring top to bottom.
    scale: multiplier of the isotropic scaling by 2^(scale_std * normal).
    rotate_frac: multiplier of the rotation.
    aniso: multiplier of scaling one axis by 2^(aniso_std * normal), and the
      other by the inverse.
    translate_frac: multiplier of the translation.
    scale_std: standard deviation of log2 of the scale.
    rotate_frac_max: largest rotation angle, in units of pi radians.
    aniso_std: standard deviation of log2 of the anisotropic scale.
    aniso_rotate_prob: probability that the anisotropic scaling uses random
      axes instead of the image axes.
    translate_frac_std: standard deviation of the translation, in image sizes.
    rotate_int: multiplier of the rotation by multiples of 90 degrees. This and
      the following are not used in the paper; `apply` needs `more` for them.
    translate_int: multiplier of the translation by whole pixels.
    translate_int_max: range of that translation, in image sizes.
    brightness: multiplier of adding brightness_std * normal.
    contrast: multiplier of multiplying by 2^(contrast_std * normal).
    lumaflip: multiplier of the reflection of the gray axis.
    hue: multiplier of the rotation about the gray axis.
    saturation: multiplier of multiplying the rest by 2^(saturation_std *
      normal).
    brightness_std, contrast_std, saturation_std: see above.
    hue_max: largest rotation of the hue, in units of pi radians.

  Raises:
    UserError: at construction, for a probability outside [0, 1] or a negative
      number.
  """

  p: float = 1.0
  xflip: float = 0.0
  yflip: float = 0.0
  scale: float = 0.0
  rotate_frac: float = 0.0
  aniso: float = 0.0
  translate_frac: float = 0.0
  scale_std: float = 0.2
  rotate_frac_max: float = 1.0
  aniso_std: float = 0.2
  aniso_rotate_prob: float = 0.5
  translate_frac_std: float = 0.125
  rotate_int: float = 0.0
  translate_int: float = 0.0
  translate_int_max: float = 0.125
  brightness: float = 0.0
  contrast: float = 0.0
  lumaflip: float = 0.0
  hue: float = 0.0
  saturation: float = 0.0
  brightness_std: float = 0.2
  contrast_std: float = 0.5
  hue_max: float = 1.0
  saturation_std: float = 1.0

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      top = 1.0 if name in ("p", "aniso_rotate_prob") else math.inf
      if not 0 <= value <= top:
        expected = "0 to 1" if top == 1 else "0 or more"
        raise UserError(
            f"augmentation.{name}: got {value}, expected {expected}; change it"
        )

  @property
  def label_columns(self) -> tuple[int, ...]:
    """Label columns of the transforms with a multiplier above 0.

    In the official order. The official code returns only these columns; `apply`
    returns all nine, or nineteen with `more`, and sets the others to 0.
    """
    on = (name for name in _ORDER if getattr(self, name) > 0)
    return tuple(c for name in on for c in (_TRANSFORMS | _MORE)[name][0])

  @property
  def needs_more(self) -> bool:
    """True if a transform that the paper does not use is on."""
    return any(getattr(self, name) > 0 for name in _MORE)


def training_pipe(p: float) -> AugmentPipe:
  """Returns the pipeline of EDM's `--augment=p` (p = 0.12 for CIFAR-10).

  The horizontal flip has probability 1/2; the gates of the other transforms
  open with probability p.

  Raises:
    UserError: p is not in [0, 1].
  """
  multipliers = dict.fromkeys(_TRANSFORMS, 1.0)
  multipliers["xflip"] = 1e8  # Above 1 after multiplying by any p > 0.
  return AugmentPipe(p=p, **multipliers)


class Draws(NamedTuple):
  """Random numbers of B examples, before the probabilities are applied.

  Attributes:
    xflip: [B] fair coin, 0 or 1.
    yflip: [B] fair coin, 0 or 1.
    scale: [B] standard normal.
    angle: [B] uniform in [0, 1).
    aniso: [B] standard normal.
    aniso_angle: [B] uniform in [0, 1).
    aniso_coin: [B] uniform in [0, 1); the axes are rotated if it is below
      aniso_rotate_prob.
    shift: [B, 2] standard normal, x and y.
    gates: [B, 6] uniform in [0, 1); a transform is applied if its gate is below
      its probability. In the order of the multipliers in `AugmentPipe`.
  """

  xflip: jax.Array
  yflip: jax.Array
  scale: jax.Array
  angle: jax.Array
  aniso: jax.Array
  aniso_angle: jax.Array
  aniso_coin: jax.Array
  shift: jax.Array
  gates: jax.Array


class MoreDraws(NamedTuple):
  """Random numbers of the transforms that the paper does not use.

  Attributes:
    quarters: [B] 0, 1, 2 or 3 with equal probability.
    shift_int: [B, 2] uniform in [0, 1), x and y.
    brightness, contrast, saturation: [B] standard normal.
    lumaflip: [B] fair coin, 0 or 1.
    hue: [B] uniform in [0, 1).
    gates: [B, 7], see `Draws`.
  """

  quarters: jax.Array
  shift_int: jax.Array
  brightness: jax.Array
  contrast: jax.Array
  lumaflip: jax.Array
  hue: jax.Array
  saturation: jax.Array
  gates: jax.Array


def draw_more(keys: jax.Array, dtype=jnp.float32) -> MoreDraws:
  """Draws the numbers of the other transforms, from the same keys as `draw`."""

  def one(key):
    first, second = jax.random.split(jax.random.fold_in(key, 1))
    u = jax.random.uniform(first, (5 + len(_MORE),), dtype)
    n = jax.random.normal(second, (3,), dtype)
    coin = (u[3] < 0.5).astype(dtype)
    quarters = jnp.floor(4 * u[0])
    return MoreDraws(quarters, u[1:3], n[0], n[1], coin, u[4], n[2], u[5:])

  return jax.vmap(one)(keys)


def draw(keys: jax.Array, dtype=jnp.float32) -> Draws:
  """Draws the random numbers of a batch.

  The numbers of an example depend only on its key: not on the settings of the
  pipeline, on the batch or on the position in the batch.

  Args:
    keys: [B] PRNG keys, one per example.
    dtype: dtype of the numbers.

  Returns:
    `Draws` with fields of shape [B, ...].
  """

  def one(key):
    first, second = jax.random.split(key)
    u = jax.random.uniform(first, (5 + len(_TRANSFORMS),), dtype)
    n = jax.random.normal(second, (4,), dtype)
    coins = (u[:2] < 0.5).astype(dtype)
    return Draws(*coins, n[0], u[2], n[1], u[3], u[4], n[2:], u[5:])

  return jax.vmap(one)(keys)


def _parameters(pipe: AugmentPipe, draws: Draws, dtype) -> Draws:
  """Sets the parameters of skipped transforms to 0, angles to radians."""
  draws = Draws(*(jnp.asarray(v, dtype) for v in draws))
  gate = dict(zip(_TRANSFORMS, draws.gates.T, strict=True))

  def gated(name, value):
    is_open = gate[name] < getattr(pipe, name) * pipe.p
    return jnp.where(is_open, value, 0)

  turn = (draws.angle * 2 - 1) * (np.pi * pipe.rotate_frac_max)
  axis = (draws.aniso_angle * 2 - 1) * np.pi
  return draws._replace(
      xflip=gated("xflip", draws.xflip),
      yflip=gated("yflip", draws.yflip),
      scale=gated("scale", draws.scale),
      angle=gated("rotate_frac", turn),
      aniso=gated("aniso", draws.aniso),
      aniso_angle=jnp.where(draws.aniso_coin < pipe.aniso_rotate_prob, axis, 0),
      shift=gated("translate_frac", draws.shift.T).T,
  )


def _labels(params: Draws) -> jax.Array:
  columns = [params.xflip, params.yflip, params.scale]
  columns += [jnp.cos(params.angle) - 1, jnp.sin(params.angle)]
  columns += [params.aniso * jnp.cos(params.aniso_angle)]
  columns += [params.aniso * jnp.sin(params.aniso_angle)]
  return jnp.stack([*columns, *params.shift.T], axis=1)


def _sources(pipe: AugmentPipe, params: Draws, height: int, width: int, x, y):
  """Maps output coordinates (x, y) to source coordinates (inverse warp).

  In pixels, with the origin at the image center; x and y broadcast to [n, m].

  Returns:
    x [B, n, m] and y [B, n, m].
  """

  def rotation(w):
    c, s = jnp.cos(w), jnp.sin(w)
    return jnp.stack([c, -s, s, c], axis=1).reshape(-1, 2, 2)

  stretch = jnp.exp2(pipe.aniso_std * params.aniso)
  squeeze = jnp.stack([1 / stretch, stretch], axis=1)[:, :, None]
  # The default matmul precision of a TPU would lose five digits.
  matmul = functools.partial(jnp.matmul, precision="highest")
  aniso = matmul(
      rotation(-params.aniso_angle), squeeze * rotation(params.aniso_angle)
  )
  linear = matmul(rotation(params.angle), aniso)
  linear /= jnp.exp2(pipe.scale_std * params.scale)[:, None, None]
  linear = linear[..., None, None]
  size = jnp.asarray([width, height], linear.dtype)
  shift = (params.shift * size * pipe.translate_frac_std)[..., None, None]
  x, y = x - shift[:, 0], y - shift[:, 1]
  return (
      linear[:, 0, 0] * x + linear[:, 0, 1] * y,
      linear[:, 1, 0] * x + linear[:, 1, 1] * y,
  )


def _blit(pipe, images, more: MoreDraws, is_open):
  """Rotates by quarter turns and translates by pixels.

  Returns:
    (images, labels [B, 4]).
  """
  _, height, width, _ = images.shape
  quarters = jnp.where(is_open["rotate_int"], more.quarters, 0)
  mirrored = (quarters == 1) | (quarters == 2)
  flipped = (quarters == 2) | (quarters == 3)
  if pipe.rotate_int > 0:
    if height != width:
      raise ValueError(f"rotate_int: got {height}x{width}, expected a square")
    for chosen, changed in (
        (mirrored, lambda x: x[:, :, ::-1]), (flipped, lambda x: x[:, ::-1]),
        (quarters % 2 == 1, lambda x: x.swapaxes(1, 2)),
    ):
      images = jnp.where(chosen[:, None, None, None], changed(images), images)
  size = jnp.asarray([width, height], images.dtype)
  reach = size * pipe.translate_int_max
  shift = jnp.where(
      is_open["translate_int"][:, None], more.shift_int * 2 - 1, 0
  )
  shift = jnp.round(shift * reach)
  if pipe.translate_int > 0:

    def move(image, by):
      def source(n, by):  # Reflected at the edges.
        at = jnp.mod(jnp.arange(n) + by.astype(jnp.int32), max(2 * n - 2, 1))
        return n - 1 - jnp.abs(n - 1 - at)

      rows, columns = source(height, by[1]), source(width, -by[0])
      return image[rows][:, columns]

    images = jax.vmap(move)(images, shift)
  moved = shift / jnp.where(reach > 0, reach, 1)
  turned = jnp.stack([mirrored, flipped], axis=1).astype(images.dtype)
  return images, jnp.concatenate([turned, moved], axis=1)


def _color(pipe, more: MoreDraws, is_open, dtype):
  """Returns (linear [B, 3, 3], offset [B, 3], labels [B, 6]) of the colors."""
  matmul = functools.partial(jnp.matmul, precision="highest")
  brightness, contrast, lumaflip, saturation = (
      jnp.where(is_open[name], getattr(more, name), 0)
      for name in ("brightness", "contrast", "lumaflip", "saturation")
  )
  hue = (more.hue * 2 - 1) * (np.pi * pipe.hue_max)
  hue = jnp.where(is_open["hue"], hue, 0)
  gray = jnp.full((3, 3), 1 / 3, dtype)  # Projection onto the gray axis.
  cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
  rest = jnp.eye(3, dtype=dtype) - gray

  def wide(value):
    return value[:, None, None]

  scale = jnp.exp2(pipe.contrast_std * contrast)
  offset = (scale * pipe.brightness_std * brightness)[:, None, None]
  offset = jnp.broadcast_to(offset, (len(hue), 3, 1))
  linear = wide(scale) * jnp.eye(3, dtype=dtype)
  for step in (
      jnp.eye(3, dtype=dtype) - 2 * gray * wide(lumaflip),
      # Rodrigues' rotation about the gray axis.
      gray + rest * wide(jnp.cos(hue))
      + jnp.asarray(cross, dtype) * wide(jnp.sin(hue)),
      gray + rest * wide(jnp.exp2(pipe.saturation_std * saturation)),
  ):
    linear, offset = matmul(step, linear), matmul(step, offset)
  labels = jnp.stack([
      brightness, contrast, lumaflip, jnp.cos(hue) - 1, jnp.sin(hue), saturation
  ], axis=1)
  return linear, offset[..., 0], labels


def _apply_color(images, linear, offset):
  """Applies [B, 3, 3] and [B, 3] to RGB images, their means to gray images."""
  if images.shape[-1] == 3:
    colored = jnp.einsum(
        "bhwc,bdc->bhwd", images, linear, precision="highest"
    )
    return colored + offset[:, None, None]
  if images.shape[-1] != 1:
    raise ValueError(
        f"images: got {images.shape[-1]} channels, expected 1 or 3 for colors"
    )
  scale = linear.mean(axis=1).sum(axis=1)[:, None, None, None]
  return images * scale + offset.mean(axis=1)[:, None, None, None]


def apply(
    pipe: AugmentPipe,
    images: jax.Array,
    draws: Draws,
    margin: warp.Margin | None = None,
    more: MoreDraws | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Augments a batch; jittable for a static pipe and margin.

  If any geometric multiplier is above 0, every image passes through the
  resampling filters, which change an image without a transform by less than
  4e-6. The output may exceed [-1, 1], because the filters ring.

  Args:
    pipe: augmentation settings.
    images: [B, H, W, C] in [-1, 1].
    draws: random numbers of the same examples, in any precision.
    margin: ((top, bottom), (left, right)), the width of the reflection padding
      in pixels; at most (and by default) H - 1 and W - 1. Pixels beyond are 0.
    more: random numbers of the transforms that the paper does not use; required
      iff one is on.

  Returns:
    (images, labels): images like the input and labels [B, 9], 0 for transforms
    that were skipped: flip x, flip y, scale, cos - 1 and sin of the rotation,
    anisotropic scale times cos and sin of its axis, translation x, translation
    y. With `more` [B, 19]: then two each of rotate_int and translate_int, one
    of brightness, contrast and lumaflip, cos - 1 and sin of the hue,
    saturation.
    Both have the dtype of the images, at least float32.

  Raises:
    ValueError: the margin is out of range; `more` is missing; rotate_int with
      images that are not square; colors of images without 1 or 3 channels.
  """
  if pipe.needs_more and more is None:
    raise ValueError("more: got None, expected the draws of the transforms")
  images = dtypes.at_least_float32(images)
  params = _parameters(pipe, draws, images.dtype)

  def select(flip, flipped):
    return jnp.where(flip[:, None, None, None] == 1, flipped, images)

  images = select(params.xflip, images[:, :, ::-1])
  images = select(params.yflip, images[:, ::-1])
  labels = _labels(params)
  if more is not None:
    more = MoreDraws(*(jnp.asarray(v, images.dtype) for v in more))
    gates = dict(zip(_MORE, more.gates.T, strict=True))
    is_open = {
        name: gates[name] < getattr(pipe, name) * pipe.p for name in _MORE
    }
    images, blits = _blit(pipe, images, more, is_open)
    linear, offset, colors = _color(pipe, more, is_open, images.dtype)
    labels = jnp.concatenate([labels, blits, colors], axis=1)
  if any(getattr(pipe, name) > 0 for name in _GEOMETRIC):
    height, width = images.shape[1:3]
    sources = functools.partial(_sources, pipe, params, height, width)
    images = warp.resample(images, sources, margin)
  if any(getattr(pipe, name) > 0 for name in _COLORS):
    images = _apply_color(images, linear, offset)
  return images, labels
