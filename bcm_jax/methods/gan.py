"""Adversarial training: losses, DiffAugment and a discriminator on features.

Images are augmented (Zhao et al., 2020), noised to a random low level (Wang et
al., 2023, Diffusion-GAN), turned into features by a denoiser's encoder, and
into logits by trained heads (DMD2, appendix F.1). No network trained on
ImageNet takes part unless a user names one, so metrics on such features stay
independent of the training. One discriminator serves all devices; in CTM's
released code every device trains its own.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax import errors
from bcm_jax.diffusion import process
from bcm_jax.interop.families import vgg_names
from bcm_jax.methods import base
from bcm_jax.methods import edm
from bcm_jax.metrics import lpips
from bcm_jax.models import discriminator
from bcm_jax.utils import cli

Params = Any

# Losses: logits [B, heads] -> [B] ---------------------------------------------


def hinge_generator(fake: jax.Array) -> jax.Array:
  """Returns -logit, a mean over heads (CTM)."""
  return -fake.mean(axis=-1)


def hinge_discriminator(fake: jax.Array, real: jax.Array) -> jax.Array:
  """Returns max(0, 1 + fake) + max(0, 1 - real) (CTM)."""
  loss = jax.nn.relu(1 + fake).mean(axis=-1)
  return loss + jax.nn.relu(1 - real).mean(axis=-1)


def softplus_generator(fake: jax.Array) -> jax.Array:
  """Returns -log sigmoid(logit), the non-saturating loss (DMD2)."""
  return jax.nn.softplus(-fake).mean(axis=-1)


def softplus_discriminator(fake: jax.Array, real: jax.Array) -> jax.Array:
  """Returns -log(1 - sigmoid(fake)) - log sigmoid(real) (DMD2)."""
  loss = jax.nn.softplus(fake).mean(axis=-1)
  return loss + jax.nn.softplus(-real).mean(axis=-1)


# DiffAugment, as StyleGAN-XL's projected discriminator does it ----------------

# Shift by up to an eighth of the side; a square of a fifth of it is cut out.
_TRANSLATION, _CUTOUT = 0.125, 0.2


def augment(images: jax.Array, keys: jax.Array) -> jax.Array:
  """Augments [B, H, W, C] in [-1, 1] by keys [B]; colors may leave it."""

  def one(image, key):
    keys = jax.random.split(key, 3)
    return _cutout(_translate(_color(image, keys[0]), keys[1]), keys[2])

  return jax.vmap(one)(images, keys)


def _color(image, key):
  """Brightness, saturation about each gray, contrast about the image's mean."""
  u = jax.random.uniform(key, (3,), image.dtype)
  image = image + u[0] - 0.5
  gray = image.mean(axis=-1, keepdims=True)
  image = gray + 2 * u[1] * (image - gray)
  mean = image.mean()
  return mean + (0.5 + u[2]) * (image - mean)


def _translate(image, key):
  """Shifts by whole pixels; fills with zeros."""
  height, width, _ = image.shape
  most = [round(_TRANSLATION * n) for n in (height, width)]
  padded = jnp.pad(image, [(most[0],) * 2, (most[1],) * 2, (0, 0)])
  shift = jax.random.randint(
      key, (2,), 0, 2 * jnp.asarray(most, jnp.int32) + 1
  )
  return jax.lax.dynamic_slice(padded, (*shift, 0), image.shape)


def _cutout(image, key):
  """Zeros in a square that is centered anywhere; edges may cut it."""
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


# The discriminator ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Discriminator:
  """Logits of images.

  Attributes:
    encoder: computes the features: a denoiser, or `Projected`.
    heads: the trained part.
    sigma_max: highest level of the noise; levels are uniform in
      sigma^(1 / rho). None adds no noise.
    augment: whether images go through DiffAugment first.
  """

  encoder: "edm.Diffusion | Projected"
  heads: discriminator.Heads
  sigma_max: float | None = 80.0
  augment: bool = True

  def init(self, key, images, labels):
    """Returns parameters of the heads."""
    sigma = jnp.ones(images.shape[:1], jnp.float32)

    def features():
      params = self.encoder.init(key, images, labels)
      return self.encoder.features(params, images, sigma, labels)

    shapes = jax.eval_shape(features)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
    return self.heads.init(key, zeros)["params"]

  def __call__(
      self, params, frozen: Any, images, labels, ctx: base.Context, stream: str
  ) -> jax.Array:
    """Returns logits [B, heads] of images [B, H, W, C].

    Args:
      params: of the heads.
      frozen: parameters of the encoder, or of a network like it.
      images: in [-1, 1].
      labels: [B] or None.
      ctx: gives keys.
      stream: name of its draws; real and generated images have their own.
    """
    if self.augment:
      images = augment(images, ctx.keys(f"{stream}/augment"))
    sigma = None
    if self.sigma_max is not None:
      sigma = self.levels(ctx.keys(f"{stream}/sigma"))
      z = process.normal_like(ctx.keys(f"{stream}/noise"), images)
      images = process.add_noise(images, sigma, z)
    features = self.encoder.features(frozen, images, sigma, labels)
    return self.heads.apply({"params": params}, features)

  def levels(self, keys) -> jax.Array:
    """Draws levels [B] between the denoiser's sigma_min and sigma_max."""
    rho = self.encoder.rho
    low, high = (
        s ** (1 / rho) for s in (self.encoder.sigma_min, self.sigma_max)
    )
    return (low + (high - low) * jax.vmap(jax.random.uniform)(keys)) ** rho


# Features of a user's network -------------------------------------------------

# Channels of the finest level; every coarser one has twice as many.
_WIDTH = 64


class Projection(nn.Module):
  """Frozen random mixing of features (projected GANs; Sauer et al., 2021).

  A random 1x1 convolution on every level, and, from coarse to fine, the sum
  with the enlarged next coarser level through another one, so that a
  discriminator cannot rely on a few channels. CTM's released code enlarges
  every level once more at the end; here it keeps its size. The parameters are
  drawn once and never trained.
  """

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


@dataclasses.dataclass(frozen=True)
class Projected:
  """A frozen network with its mixing, in place of a denoiser's encoder.

  CTM was published with DeiT and EfficientNet.

  Attributes:
    backbone: (parameters, images [B, H, W, C] in [-1, 1]) -> features
      [B, H, W, C] of one or more levels, fine to coarse; differentiable.
    load: () -> its parameters.
  """

  backbone: Callable[[Params, jax.Array], list[jax.Array]]
  load: Callable[[], Params]
  mixing = Projection()

  def init(self, key, images, labels) -> Params:
    """Returns the network's and the mixing's parameters."""
    del labels
    params = self.load()
    shapes = jax.eval_shape(self.backbone, params, images)
    mixing = self.mixing.init(
        key, [jnp.zeros(s.shape, s.dtype) for s in shapes]
    )
    return {"backbone": params, "mixing": mixing["params"]}

  def features(self, params, images, sigma, labels) -> list[jax.Array]:
    """Returns mixed features [B, H, W, C], one tensor per level."""
    del sigma, labels  # The network takes neither.
    features = self.backbone(params["backbone"], images)
    return self.mixing.apply({"params": params["mixing"]}, features)


def _vgg(params: Params, images: jax.Array) -> list[jax.Array]:
  """Returns features of VGG16 after blocks two to five."""
  return lpips.features(params, lpips.enlarge(images))[1:]


@functools.cache
def projected(name: str, path: tuple[str, ...]) -> Projected | None:
  """Returns the network that `method.gan_encoder` names.

  Args:
    name: 'vgg', or 'module:function' of a function that takes no arguments and
      returns (backbone, parameters); 'teacher' is None.
    path: files of VGG16's weights, as eval.lpips_path.

  Raises:
    UserError: unknown name, a function that cannot be imported, no weights.
  """
  if name == "teacher":
    return None
  if name == "vgg":
    if not path:
      raise errors.UserError(
          "method.gan_encoder='vgg' needs weights: set method.gan_encoder_path "
          "as docs/evaluation.md says of eval.lpips_path"
      )
    return Projected(_vgg, lambda: vgg_names.load_lpips(*path)["vgg"])
  if ":" not in name:
    raise errors.unknown_name(
        "method.gan_encoder", name, ["teacher", "vgg", "module:function"]
    )
  backbone, params = cli.named_function(
      "method.gan_encoder", name, "that returns (backbone, parameters)"
  )()
  return Projected(backbone, lambda: params)


# Of a method with the field `gan_encoder`.
ENCODER = base.FrozenNetwork(
    lambda options: projected(
        options["gan_encoder"], tuple(options["gan_encoder_path"])
    ),
    config_keys={
        "gan_encoder": (str, "teacher"),
        "gan_encoder_path": (tuple[str, ...], ()),
    },
    path_keys=("gan_encoder_path",),
)
