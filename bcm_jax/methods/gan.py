"""Adversarial training: losses, DiffAugment and a discriminator on features.

Images are augmented (DiffAugment; Zhao et al., 2020) and noised to a random
level (Diffusion-GAN; Wang et al., 2023). A denoiser's encoder computes features
and trained heads compute logits (DMD2, appendix F.1). By default no network
trained on ImageNet is used, so that metrics on such features are independent of
the training. All devices share one discriminator; in the released code of CTM
every device trains its own.
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
  """Returns the generator's hinge loss -logit [B], a mean over heads (CTM)."""
  return -fake.mean(axis=-1)


def hinge_discriminator(fake: jax.Array, real: jax.Array) -> jax.Array:
  """Returns the hinge loss max(0, 1 + fake) + max(0, 1 - real) [B] (CTM)."""
  loss = jax.nn.relu(1 + fake).mean(axis=-1)
  return loss + jax.nn.relu(1 - real).mean(axis=-1)


def softplus_generator(fake: jax.Array) -> jax.Array:
  """Returns the non-saturating loss -log sigmoid(logit) [B] (DMD2)."""
  return jax.nn.softplus(-fake).mean(axis=-1)


def softplus_discriminator(fake: jax.Array, real: jax.Array) -> jax.Array:
  """Returns -log(1 - sigmoid(fake)) - log sigmoid(real) [B] (DMD2)."""
  loss = jax.nn.softplus(fake).mean(axis=-1)
  return loss + jax.nn.softplus(-real).mean(axis=-1)


# DiffAugment with the settings of StyleGAN-XL --------------------------------

# Maximum translation and size of the cutout, as fractions of the image size.
_TRANSLATION, _CUTOUT = 0.125, 0.2


def augment(images: jax.Array, keys: jax.Array) -> jax.Array:
  """Applies DiffAugment: color, translation and cutout.

  Args:
    images: [B, H, W, C] in [-1, 1].
    keys: [B].

  Returns:
    [B, H, W, C]; values may be outside of [-1, 1].
  """

  def augment_image(image, key):
    keys = jax.random.split(key, 3)
    return _cutout(_translate(_color(image, keys[0]), keys[1]), keys[2])

  return jax.vmap(augment_image)(images, keys)


def _color(image, key):
  """Changes brightness, saturation and contrast."""
  u = jax.random.uniform(key, (3,), image.dtype)
  image = image + u[0] - 0.5
  gray = image.mean(axis=-1, keepdims=True)
  image = gray + 2 * u[1] * (image - gray)
  mean = image.mean()
  return mean + (0.5 + u[2]) * (image - mean)


def _translate(image, key):
  """Translates by whole pixels and pads with zeros."""
  height, width, _ = image.shape
  limit = [round(_TRANSLATION * n) for n in (height, width)]
  padded = jnp.pad(image, [(limit[0],) * 2, (limit[1],) * 2, (0, 0)])
  shift = jax.random.randint(
      key, (2,), 0, 2 * jnp.asarray(limit, jnp.int32) + 1
  )
  return jax.lax.dynamic_slice(padded, (*shift, 0), image.shape)


def _cutout(image, key):
  """Sets a square with a random center to zero; clipped at the edges."""
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
  """Discriminator: trained heads on a frozen encoder.

  Attributes:
    encoder: feature network, a denoiser or `Projected`.
    heads: trained module, features -> logits.
    sigma_max: maximum noise level; levels are uniform in sigma^(1 / rho). None
      adds no noise.
    augment: whether to apply DiffAugment.
  """

  encoder: "edm.Diffusion | Projected"
  heads: discriminator.Heads
  sigma_max: float | None = 80.0
  augment: bool = True

  def init(self, key, images, labels):
    """Returns parameters of the heads for images [B, H, W, C]."""
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
      params: parameters of the heads.
      frozen: parameters of the encoder.
      images: real or generated images in [-1, 1].
      labels: [B] int32 or None.
      ctx: keys and augmentation labels.
      stream: name of the random stream, different for real and generated
        images.
    """
    if self.augment:
      images = augment(images, ctx.keys(f"{stream}/augment"))
    sigma = None
    if self.sigma_max is not None:
      sigma = self.levels(ctx.keys(f"{stream}/sigma"))
      z = process.normal_like(ctx.keys(f"{stream}/noise"), images)
      images = process.add_noise(images, sigma, z)
    features = self.encoder.features(
        frozen, images, sigma, labels, ctx.augment_labels
    )
    return self.heads.apply({"params": params}, features)

  def levels(self, keys) -> jax.Array:
    """Draws levels [B], uniform in sigma^(1 / rho), from keys [B]."""
    rho = self.encoder.rho
    low, high = (
        s ** (1 / rho) for s in (self.encoder.sigma_min, self.sigma_max)
    )
    return (low + (high - low) * jax.vmap(jax.random.uniform)(keys)) ** rho


# Features of a user's network -------------------------------------------------

# Channels of the finest level; doubled at every coarser level.
_WIDTH = 64


class Projection(nn.Module):
  """Random cross-scale mixing (Projected GANs; Sauer et al., 2021, sec. 3.2).

  A random 1x1 convolution per level mixes channels. From coarse to fine, the
  upsampled coarser level is added and another random 1x1 convolution follows.
  The discriminator then cannot rely on few channels. The parameters are never
  trained. The released code of CTM upsamples every output once more; here the
  resolution is kept.
  """

  @nn.compact
  def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
    """Mixes features [B, H, W, C] of all levels, fine to coarse.

    Returns:
      Mixed features of the same resolutions, fine to coarse.
    """

    def mix(h, width, name):
      init = nn.initializers.he_normal()
      return nn.Conv(width, (1, 1), kernel_init=init, name=name)(h)

    channel_mixed = [
        mix(h, _WIDTH * 2**i, f"channels{i}") for i, h in enumerate(features)
    ]
    mixed, coarser = [], None
    for i in reversed(range(len(channel_mixed))):
      h = channel_mixed[i]
      if coarser is not None:
        shape = (*h.shape[:3], coarser.shape[-1])
        h = h + jax.image.resize(coarser, shape, "bilinear")
      # The width of the next finer level, to which the result is added.
      coarser = mix(h, _WIDTH * 2 ** max(i - 1, 0), f"scales{i}")
      mixed.insert(0, coarser)
    return mixed


@dataclasses.dataclass(frozen=True)
class Projected:
  """Feature network of a projected GAN: a frozen backbone with `Projection`.

  The published CTM uses DeiT and EfficientNet as backbones.

  Attributes:
    backbone: (parameters, images [B, H, W, C] in [-1, 1]) -> features
      [B, H, W, C] of one or more levels, fine to coarse; differentiable.
    load: () -> parameters of the backbone.
    mixing: the random projection.
  """

  backbone: Callable[[Params, jax.Array], list[jax.Array]]
  load: Callable[[], Params]
  mixing = Projection()

  def init(self, key, images, labels) -> Params:
    """Returns the parameters of backbone and projection."""
    del labels
    params = self.load()
    shapes = jax.eval_shape(self.backbone, params, images)
    mixing = self.mixing.init(
        key, [jnp.zeros(s.shape, s.dtype) for s in shapes]
    )
    return {"backbone": params, "mixing": mixing["params"]}

  def features(
      self, params, images, sigma, labels, augment_labels=None
  ) -> list[jax.Array]:
    """Returns mixed features [B, H, W, C] per level, fine to coarse."""
    del sigma, labels, augment_labels  # Not inputs of the backbone.
    features = self.backbone(params["backbone"], images)
    return self.mixing.apply({"params": params["mixing"]}, features)


def _vgg(params: Params, images: jax.Array) -> list[jax.Array]:
  """Returns features of VGG16 after blocks 2 to 5."""
  return lpips.features(params, lpips.enlarge(images))[1:]


@functools.cache
def projected(name: str, path: tuple[str, ...]) -> Projected | None:
  """Returns the feature network of `method.gan_encoder`.

  Args:
    name: 'teacher'; 'vgg'; or 'module:function', a function without arguments
      that returns (backbone, parameters).
    path: weight files of VGG16, as eval.lpips_path.

  Returns:
    The network; None for 'teacher'.

  Raises:
    UserError: unknown name, import failed, or no weight files.
  """
  if name == "teacher":
    return None
  if name == "vgg":
    if not path:
      raise errors.UserError(
          "method.gan_encoder_path: got (), expected weight files for "
          "method.gan_encoder='vgg'; see eval.lpips_path in docs/evaluation.md"
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


# Declaration for methods with a field `gan_encoder`.
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
