"""Distribution matching distillation: DMD and DMD2 (Yin et al., 2024).

A generator x = G(sigma_max z) follows the gradient of the KL divergence between
its noised images and the data's, a difference of two denoisers (DMD, eq. 4 to 7
and algorithm 2),

  grad = (mu_fake(x_s, s) - mu_real(x_s, s)) / mean |x - mu_real(x_s, s)|
  L_DM = 1/2 |x - sg(x - grad)|^2

with mu_real the frozen teacher and mu_fake a second network, trained to denoise
generated images. DMD (algorithm 1) adds a regression loss on pairs of noise and
teacher sample (data.pairs). DMD2 omits it, updates mu_fake five times per
generator update (section 4.2), adds a GAN loss on the encoder of mu_fake
(section 4.3), and samples in several steps x <- G(x + sigma_k z), trained on
its own intermediate images (backward simulation, section 4.5).

If the denominator vanishes, the released code uses nan_to_num; here it has a
lower bound. The released code of DMD2 also divides by |x - mu_real|, while
FastGen uses the noised x.
"""

from collections.abc import Mapping
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import process
from bcm_jax.methods import base
from bcm_jax.methods import cd
from bcm_jax.methods import edm
from bcm_jax.methods import gan
from bcm_jax.models import discriminator

DMD = base.Preset(
    dict(regression_weight=0.25, fake_updates=1, gan_weight=0.0),
    "one-step generator, distilled by distribution matching,",
    "Yin et al., 2024 (DMD)",
)
DMD2 = base.Preset(
    dict(regression_weight=0.0, fake_updates=5, gan_weight=3e-3),
    "few-step generator, distilled by distribution matching,",
    "Yin et al., 2024 (DMD2)",
)
# The generator's losses omit the lowest and highest 2% of the 1,000 levels of
# the released grids.
_LOW, _HIGH = 0.02, 0.98
# Lower bound of the denominator.
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class DistributionMatching(
    cd.ImageDistance, base.PreconditionedNetwork, base.Method
):
  """The losses of the module docstring.

  Attributes:
    network: network of the generator and of mu_fake.
    preconditioning: preconditioning of both.
    c_noise: noise conditioning of both.
    teacher: mu_real; it initializes the generator and mu_fake.
    steps: number of evaluations of the generator; the start levels are those
      of a Karras grid with steps + 1 points.
    dm_weight: factor on mu_fake - mu_real, which is s^2 times the difference of
      scores: 'normalized' as in the module docstring, 'sigma' 1 / s, 'sigma3'
      s, or 'none' 1 (DMD, section 4.2).
    regression_weight: weight of d(G(z), y) over pairs (z, y); 0 omits it.
    fake_updates: updates of mu_fake per update of the generator.
    gan_weight: weight of the generator's GAN loss; 0 omits the discriminator.
    gan_fake_weight: weight of the discriminator's loss in that of mu_fake.
    gan_levels: levels of features with heads, see discriminator.Heads; empty is
      the coarsest level.
    gan_features: width of the heads, see discriminator.Heads.
  """

  teacher: edm.Diffusion | None = base.frozen_field()
  preconditioning: base.PreconditioningName = "edm"
  steps: int = 1
  dm_weight: Literal["normalized", "sigma", "sigma3", "none"] = "normalized"
  regression_weight: float = 0.25
  lpips_pooling: Literal["max", "average"] = "max"
  fake_updates: int = 1
  gan_weight: float = 0.0
  gan_fake_weight: float = 1e-2
  gan_levels: tuple[int, ...] = ()
  gan_features: int | None = None

  auxiliary_networks = True
  takes_end_time = False  # The generator maps only to images.
  frozen = {"teacher": cd.TEACHER, "lpips": cd.LPIPS}

  @classmethod
  def constraints(cls, config):
    """Checks that the network has no end level, and the distance."""
    return edm.needs_one_time(config) or cls.distance_constraints(config)

  @classmethod
  def extra_fields(cls, options):
    """Declares the noise of each image, for the regression loss."""
    weight = options["regression_weight"]
    if not weight:
      return {}
    return {"noise": f"method.regression_weight={weight}"}

  # Networks -------------------------------------------------------------------

  @property
  def networks(self) -> Mapping[str, base.TrainableNetwork]:
    """The generator, and mu_fake with the discriminator's head."""
    return {
        "student": base.TrainableNetwork(
            self.network, self.denoiser.init, init_from="teacher"
        ),
        "fake_score": base.TrainableNetwork(
            self.network, self.init_fake, load_pretrained=_with_head,
            init_from="teacher",
        ),
    }

  @property
  def losses(self) -> Mapping[str, base.Loss]:
    """Losses of the generator and of mu_fake."""
    return {"student": self.student_loss, "fake_score": self.fake_loss}

  def phase(self, step: int) -> tuple[str, ...]:
    """Returns mu_fake in every step, the generator in every fake_updates-th."""
    if step % self.fake_updates:
      return ("fake_score",)
    return ("student", "fake_score")

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Returns the phases with and without an update of the generator."""
    both = ("student", "fake_score")
    return (both,) if self.fake_updates == 1 else (both, ("fake_score",))

  def flow_map(self, params):
    """Returns f(x, t, u, labels) = G(x, t); ignores u."""
    return lambda x, t, u, labels=None: self.denoiser.denoise(
        params, x, t, labels
    )

  @property
  def denoiser(self) -> edm.Diffusion:
    """Preconditioned denoiser that evaluates the generator and mu_fake."""
    return edm.Diffusion(
        self.network, self.c_noise, self.preconditioning, self.sigma_data,
        self.sigma_min, self.sigma_max, self.rho,
    )

  @property
  def discriminator(self) -> gan.Discriminator:
    """Discriminator on the encoder of mu_fake, with noise, no augmentation."""
    heads = discriminator.Heads(self.gan_levels or (-1,), self.gan_features)
    return gan.Discriminator(
        self.denoiser, heads, self.sigma_max, augment=False
    )

  def init_fake(self, key, images, labels):
    """Returns parameters of mu_fake and, with gan_weight, of the head."""
    params = {"network": self.denoiser.init(key, images, labels)}
    if self.gan_weight:
      params["head"] = self.discriminator.init(key, images, labels)
    return params

  # The generator --------------------------------------------------------------

  @property
  def start_levels(self) -> tuple[float, ...]:
    """Noise levels of the generator's evaluations, descending."""
    return tuple(
        float(_karras(k / self.steps, self)) for k in range(self.steps)
    )

  def generate(self, params, ctx: base.Context, labels) -> jax.Array:
    """Returns generated images x [B, H, W, C] (DMD2, section 4.5).

    Draws one step m for the batch. Steps before m run without gradients and
    generate the input of step m. With data.augment all networks, the generator
    too, have the augmentation labels of the batch, and sampling has none.
    """
    levels = jnp.asarray(self.start_levels, ctx.images.dtype)
    m = jax.random.randint(ctx.shared_key("generator/step"), (), 0, self.steps)

    def noise(k):
      keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
          ctx.keys("generator/noise"), k
      )
      return process.normal_like(keys, ctx.images)

    def denoise(params, x, k):
      return self.denoiser.denoise(
          params, x, jnp.full(len(x), levels[k]), labels,
          augment_labels=ctx.augment_labels,
      )

    def step(k, x):
      clean = denoise(jax.lax.stop_gradient(params), x, k)
      return clean + levels[k + 1] * noise(k + 1)

    x = jax.lax.fori_loop(0, m, step, levels[0] * noise(0))
    return denoise(params, jax.lax.stop_gradient(x), m)

  def labels(self, ctx: base.Context) -> jax.Array | None:
    """Draws labels [B] of the images to generate, independent of the data."""
    if ctx.labels is None:
      return None
    classes = self.network.num_classes
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, classes))(
        ctx.keys("generator/label")
    )

  def levels(self, ctx: base.Context, stream: str, low: float, high: float):
    """Draws noise levels [B], uniform in sigma^(1 / rho).

    Args:
      ctx: keys.
      stream: name of the random stream.
      low: lower end, as a fraction of the range from sigma_min up.
      high: upper end, as a fraction of the range.
    """
    v = jax.vmap(jax.random.uniform)(ctx.keys(f"{stream}/sigma"))
    return _karras(1 - (low + v * (high - low)), self).astype(ctx.images.dtype)

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """Draws noise levels by name, for the report of mode inspect."""
    return {
        "sigma of the gradient": self.levels(ctx, "dm", _LOW, _HIGH),
        "sigma of the fake score": self.levels(ctx, "fake", 0.0, 1.0),
    }

  def gradient(self, ctx: base.Context, x, labels) -> jax.Array:
    """Returns grad [B, H, W, C] of images x (DMD, algorithm 2).

    Stop-gradiented.
    """
    sigma = self.levels(ctx, "dm", _LOW, _HIGH)
    z = process.normal_like(ctx.keys("dm/noise"), x)
    x_s = process.add_noise(x, sigma, z)
    augment = dict(augment_labels=ctx.augment_labels)
    real = self.teacher.denoise(
        ctx.frozen["teacher"], x_s, sigma, labels, **augment
    )
    fake = self.denoiser.denoise(
        ctx.networks["fake_score"]["network"], x_s, sigma, labels, **augment
    )
    size = jnp.mean(jnp.abs(x - real), axis=(1, 2, 3))
    factor = {
        "normalized": lambda: 1 / jnp.maximum(size, _EPSILON),
        "sigma": lambda: 1 / sigma, "sigma3": lambda: sigma,
        "none": lambda: jnp.ones_like(sigma),
    }[self.dm_weight]()
    return jax.lax.stop_gradient(
        process.expand(factor, x.ndim) * (fake - real)
    )

  def student_loss(self, params, ctx: base.Context):
    """Returns the generator's loss [B] and its terms."""
    labels = self.labels(ctx)
    x = self.generate(params, ctx, labels)
    target = jax.lax.stop_gradient(
        x - self.gradient(ctx, jax.lax.stop_gradient(x), labels)
    )
    parts = {"loss_dm": distances.l2(x, target) / 2}
    loss = parts["loss_dm"]
    if self.regression_weight:
      parts["loss_regression"] = self._regression(params, ctx)
      loss += self.regression_weight * parts["loss_regression"]
    if self.gan_weight:
      logits = self.logits(
          ctx.networks["fake_score"], x, labels, ctx, "generator"
      )
      parts["loss_gan"] = gan.softplus_generator(logits)
      loss += self.gan_weight * parts["loss_gan"]
    return loss, parts

  def _regression(self, params, ctx: base.Context) -> jax.Array:
    """Returns d(G(z), y) [B] of pairs of noise z and teacher sample y."""
    start = self.sigma_max * ctx.extra["noise"].astype(ctx.images.dtype)
    sigma = jnp.full(len(start), self.sigma_max, start.dtype)
    x = self.denoiser.denoise(params, start, sigma, ctx.labels)
    return self.distance(x, ctx.images, ctx)

  # mu_fake --------------------------------------------------------------------

  def logits(self, fake, images, labels, ctx: base.Context, stream: str):
    """Returns logits [B, heads] of images by the parameters of mu_fake."""
    return self.discriminator(
        fake["head"], fake["network"], images, labels, ctx, stream
    )

  def fake_loss(self, params, ctx: base.Context):
    """Returns the loss of mu_fake [B] and its terms.

    The denoising loss on generated images plus the discriminator's loss.
    """
    labels = self.labels(ctx)
    x = jax.lax.stop_gradient(
        self.generate(ctx.networks["student"], ctx, labels)
    )
    sigma = self.levels(ctx, "fake", 0.0, 1.0)
    z = process.normal_like(ctx.keys("fake/noise"), x)
    d = self.denoiser.denoise(
        params["network"], process.add_noise(x, sigma, z), sigma, labels,
        augment_labels=ctx.augment_labels,
    )
    loss = self.denoiser.weight(sigma) * distances.l2(d, x)
    parts = {"loss_denoising": loss}
    if self.gan_weight:
      logits = {
          "fake": self.logits(params, x, labels, ctx, "judge_fake"),
          "real": self.logits(
              params, ctx.images, ctx.labels, ctx, "judge_real"
          ),
      }
      parts["loss_gan"] = gan.softplus_discriminator(**logits)
      parts |= {f"logit_{k}": v.mean(axis=-1) for k, v in logits.items()}
      loss = loss + self.gan_fake_weight * parts["loss_gan"]
    return loss, parts


def _karras(share, method) -> jax.Array:
  """Returns a point of the Karras grid (EDM, eq. 5).

  Args:
    share: position in [0, 1] from sigma_max to sigma_min.
    method: gives sigma_min, sigma_max and rho.
  """
  high, low = (
      s ** (1 / method.rho) for s in (method.sigma_max, method.sigma_min)
  )
  return (high + share * (low - high)) ** method.rho


def _with_head(source, fresh):
  """Returns parameters of mu_fake: the teacher's, with a fresh head."""
  return fresh | {"network": source}
