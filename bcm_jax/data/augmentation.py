"""Non-leaky augmentation: images are changed, and the network is told how.

EDM's pipe (Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", 2022, appendix F.2), which turns images by six kinds of
geometric transforms, each with a small probability, and gives the network the
nine numbers that describe the change. At sampling nine zeros ask for images
that nothing was done to. The machinery of the resampling is that of Karras et
al., "Training Generative Adversarial Networks with Limited Data" (2020); see
`warp`.

`draw` and `apply` are pure, and all of an example's randomness comes from its
own key. Unlike in the official code an image never depends on the rest of its
batch: there the reflected margin is as wide as the batch's worst transform
needs; here it is always the widest, which changes even noise by less than 1e-4.
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

# A transform, the columns of its labels, and the kinds of its random numbers
# in the official order. A number is a field of `Draws`, or its gate.
_TRANSFORMS = {
    "xflip": ((0,), ("xflip", "gate")),
    "yflip": ((1,), ("yflip", "gate")),
    "scale": ((2,), ("scale", "gate")),
    "rotate_frac": ((3, 4), ("angle", "gate")),
    "aniso": ((5, 6), ("aniso", "aniso_angle", "gate", "aniso_coin")),
    "translate_frac": ((7, 8), ("shift", "gate")),
}
_GEOMETRIC = tuple(_TRANSFORMS)[2:]


@dataclasses.dataclass(frozen=True)
class AugmentPipe:
  """What may happen to an image; names and defaults are the official ones.

  A transform happens with probability min(1, p * multiplier), which for a flip
  is the probability of tossing the coin that decides about it. Multipliers
  default to 0, never; `training_pipe` gives the settings of the paper.

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
    rotate_frac_max: largest rotation, 1 is half a turn to either side.
    aniso_std: standard deviation of log2 of the anisotropic scale.
    aniso_rotate_prob: probability that its axes point in a random direction,
      and not along those of the image.
    translate_frac_std: standard deviation of the translation, in image sizes.

  Raises:
    UserError: on making it, for a p outside of [0, 1] or a negative number.
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

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      top = 1.0 if name in ("p", "aniso_rotate_prob") else math.inf
      if not 0 <= value <= top:
        expected = "0 to 1" if top == 1 else "0 or more"
        raise UserError(
            f"augmentation: {name} is {value}, expected {expected}; change it"
        )

  @property
  def label_columns(self) -> tuple[int, ...]:
    """Columns of the labels whose transforms are on.

    The official pipe returns only these; the other columns are always 0 here,
    so that there are always nine.
    """
    on = (name for name in _TRANSFORMS if getattr(self, name) > 0)
    return tuple(c for name in on for c in _TRANSFORMS[name][0])


def training_pipe(p: float) -> AugmentPipe:
  """The pipe of EDM's trainings (`--augment=p`, p = 0.12 for CIFAR-10).

  Every image tosses the coin for mirroring left to right; the other transforms
  happen with probability p.

  Raises:
    UserError: p is not in [0, 1].
  """
  multipliers = dict.fromkeys(_TRANSFORMS, 1.0)
  multipliers["xflip"] = 1e8  # Times any p but 0 more than 1: always.
  return AugmentPipe(p=p, **multipliers)


class Draws(NamedTuple):
  """Random numbers of B examples, before probabilities are looked at.

  Attributes:
    xflip: [B] 0 or 1, the coin.
    yflip: [B] 0 or 1, the coin.
    scale: [B] standard normal.
    angle: [B] uniform in [0, 1).
    aniso: [B] standard normal.
    aniso_angle: [B] uniform.
    aniso_coin: [B] uniform; its axes turn where it is < aniso_rotate_prob.
    shift: [B, 2] standard normal, x and y.
    gates: [B, 6] uniform; a transform happens where its gate is below its
      probability. In the order of the multipliers in `AugmentPipe`.
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


def draw(keys: jax.Array, dtype=jnp.float32) -> Draws:
  """Draws the random numbers of a batch.

  They depend on nothing but each example's key: not on the pipe's settings,
  the batch or its position in it.

  Args:
    keys: [B].
    dtype: of the numbers.

  Returns:
    Fields [B, ...].
  """

  def one(key):
    first, second = jax.random.split(key)
    u = jax.random.uniform(first, (5 + len(_TRANSFORMS),), dtype)
    n = jax.random.normal(second, (4,), dtype)
    coins = (u[:2] < 0.5).astype(dtype)
    return Draws(*coins, n[0], u[2], n[1], u[3], u[4], n[2:], u[5:])

  return jax.vmap(one)(keys)


def _parameters(pipe: AugmentPipe, draws: Draws, dtype) -> Draws:
  """Draws with 0 where a transform does not happen, angles in radians."""
  draws = Draws(*(jnp.asarray(v, dtype) for v in draws))
  gate = dict(zip(_TRANSFORMS, draws.gates.T, strict=True))

  def gated(name, value):
    happens = gate[name] < getattr(pipe, name) * pipe.p
    return jnp.where(happens, value, 0)

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
  """Where in the image the points (x, y) of the result come from.

  Pixels, with the origin at the image's centre; x and y broadcast to [n, m].

  Returns:
    x [B, n, m] and y [B, n, m].
  """

  def rotation(w):
    c, s = jnp.cos(w), jnp.sin(w)
    return jnp.stack([c, -s, s, c], axis=1).reshape(-1, 2, 2)

  stretch = jnp.exp2(pipe.aniso_std * params.aniso)
  squeeze = jnp.stack([1 / stretch, stretch], axis=1)[:, :, None]
  # In the default precision of a TPU this would lose five digits.
  times = functools.partial(jnp.matmul, precision="highest")
  aniso = times(
      rotation(-params.aniso_angle), squeeze * rotation(params.aniso_angle)
  )
  linear = times(rotation(params.angle), aniso)
  linear /= jnp.exp2(pipe.scale_std * params.scale)[:, None, None]
  linear = linear[..., None, None]
  size = jnp.asarray([width, height], linear.dtype)
  shift = (params.shift * size * pipe.translate_frac_std)[..., None, None]
  x, y = x - shift[:, 0], y - shift[:, 1]
  return (
      linear[:, 0, 0] * x + linear[:, 0, 1] * y,
      linear[:, 1, 0] * x + linear[:, 1, 1] * y,
  )


def apply(
    pipe: AugmentPipe,
    images: jax.Array,
    draws: Draws,
    margin: warp.Margin | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Augments a batch; jittable for a static pipe and margin.

  With any geometric multiplier above 0 every image goes through the resampling
  filters, whose double pass changes an image that nothing happens to by less
  than 4e-6. Results may leave [-1, 1], for the filters ring.

  Args:
    pipe: what may happen.
    images: [B, H, W, C] in [-1, 1].
    draws: of the same examples; numbers in any precision.
    margin: ((top, bottom), (left, right)), the pixels that are reflected
      around the images, at most H - 1 and W - 1, which is the default. Beyond
      them is 0.

  Returns:
    Images like the input and labels [B, 9], zeros where nothing happened: flip
    x, flip y, scale, cos - 1 and sin of the rotation, anisotropic scale times
    cos and sin of its axis, translation x, translation y. In the precision of
    the images, float32 at least.

  Raises:
    ValueError: for a margin out of range.
  """
  images = dtypes.at_least_float32(images)
  params = _parameters(pipe, draws, images.dtype)

  def where(happens, changed):
    return jnp.where(happens[:, None, None, None] == 1, changed, images)

  images = where(params.xflip, images[:, :, ::-1])
  images = where(params.yflip, images[:, ::-1])
  if any(getattr(pipe, name) > 0 for name in _GEOMETRIC):
    height, width = images.shape[1:3]
    sources = functools.partial(_sources, pipe, params, height, width)
    images = warp.resample(images, sources, margin)
  return images, _labels(params)
