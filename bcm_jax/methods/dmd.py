"""Distribution matching distillation: DMD and DMD2 (Yin et al., 2024).

A generator x = G(sigma_max z) follows the gradient of the KL divergence between
its noised images and the data's, a difference of two denoisers,

  grad = (mu_fake(x_s, s) - mu_real(x_s, s)) / mean |x - mu_real(x_s, s)|
  L_DM = 1/2 |x - sg(x - grad)|^2

with mu_real the frozen teacher and mu_fake a second network, which learns to
denoise what the generator makes. DMD adds a regression to what the teacher's
solver made of some noises (data.pairs); DMD2 trains mu_fake five times as often
instead, has its encoder tell real from generated images, and generates in
several steps, x <- G(x + sigma_k z), from inputs made by itself.

In the released code nan_to_num hides a vanishing denominator; here it has a
floor.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.methods import base
from bcm_jax.methods import cd
from bcm_jax.methods import edm
from bcm_jax.methods import gan
from bcm_jax.models import discriminator

# Options that make the two published methods of the one class.
DMD: Mapping[str, Any] = dict(
    regression_weight=0.25, fake_updates=1, gan_weight=0.0
)
DMD2: Mapping[str, Any] = dict(
    regression_weight=0.0, fake_updates=5, gan_weight=3e-3
)
# Of the released grids of 1,000 levels: the generator's losses leave out the
# first and the last fiftieth.
_LOW, _HIGH = 0.02, 0.98
_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class DistributionMatching:
  """The losses above.

  Attributes:
    network, scalings, noise: of the generator and of mu_fake, the teacher's.
    sigma_data, sigma_min, sigma_max, rho: data spread and range of levels.
    teacher: mu_real; all three start from it.
    steps: evaluations of the generator; their start levels are those of a
      Karras grid of steps + 1 points.
    dm_weight: how the difference of the denoisers is scaled: 'normalised' as
      above, or by 'sigma', 'sigma3' or 'none' times the difference of scores.
    regression_weight: of d(G(z), y) over pairs (z, y); 0 leaves it out.
    metric, huber_c, feature_sigma, lpips_path, lpips_pooling: d, as in
      distillation.
    fake_updates: updates of mu_fake to one of the generator.
    gan_weight: of the generator's adversarial loss; 0 leaves the head out.
    gan_fake_weight: of mu_fake's.
    gan_levels, gan_features: see discriminator; empty is the coarsest level.
  """

  network: nn.Module
  scalings: preconditioning.Preconditioning
  noise: Callable[[jax.Array], jax.Array] = preconditioning.edm_noise
  teacher: edm.Diffusion = dataclasses.field(kw_only=True)
  sigma_data: float = 0.5
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  steps: int = 1
  dm_weight: Literal["normalised", "sigma", "sigma3", "none"] = "normalised"
  regression_weight: float = 0.25
  metric: Literal["pseudo_huber", "l2", "l1", "features", "lpips"] = "features"
  huber_c: float | None = None
  feature_sigma: float = 0.05
  lpips_path: tuple[str, ...] = ()
  lpips_pooling: Literal["max", "average"] = "max"
  fake_updates: int = 1
  gan_weight: float = 0.0
  gan_fake_weight: float = 1e-2
  gan_levels: tuple[int, ...] = ()
  gan_features: int | None = None

  sampled_network = "student"
  # Its map leads to images alone.
  takes_end_time = False
  supports_inversion = False
  is_denoiser = False
  averages: Mapping[str, base.Average] = dataclasses.field(
      default_factory=dict, init=False
  )

  # What it declares -----------------------------------------------------------

  @property
  def networks(self) -> Mapping[str, base.TrainableNetwork]:
    """The generator, and mu_fake with its head."""
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
    """By network."""
    return {"student": self.student_loss, "fake_score": self.fake_loss}

  def phase(self, step: int) -> tuple[str, ...]:
    """mu_fake in every step, the generator in every fake_updates-th."""
    if step % self.fake_updates:
      return ("fake_score",)
    return ("student", "fake_score")

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Both kinds of steps."""
    both = ("student", "fake_score")
    return (both,) if self.fake_updates == 1 else (both, ("fake_score",))

  def curriculum(self, step: int) -> dict[str, Any]:
    """Nothing changes with the step."""
    del step
    return {}

  def flow_map(self, params):
    """f(x, t, u, labels) = G(x, t), whatever u."""
    return lambda x, t, u, labels=None: self.denoiser.denoise(
        params, x, t, labels
    )

  @property
  def denoiser(self) -> edm.Diffusion:
    """The generator and mu_fake as what they are evaluated as."""
    return edm.Diffusion(
        self.network, self.scalings, self.noise, self.sigma_data,
        self.sigma_min, self.sigma_max, self.rho,
    )

  @property
  def discriminator(self) -> gan.Discriminator:
    """The head on mu_fake's encoder; images are noised, not augmented."""
    heads = discriminator.Heads(self.gan_levels or (-1,), self.gan_features)
    return gan.Discriminator(
        self.denoiser, heads, self.sigma_max, augment=False
    )

  def init_fake(self, key, images, labels):
    """Fresh parameters of mu_fake, with a head where there is a loss for it."""
    params = {"network": self.denoiser.init(key, images, labels)}
    if self.gan_weight:
      params["head"] = self.discriminator.init(key, images, labels)
    return params

  # The generator --------------------------------------------------------------

  @property
  def start_levels(self) -> tuple[float, ...]:
    """Levels at which the generator is evaluated, noisiest first."""
    return tuple(
        float(_karras(k / self.steps, self)) for k in range(self.steps)
    )

  def generate(self, params, ctx: base.Context, labels) -> jax.Array:
    """Images x [B, H, W, C]: the last of m + 1 steps, m drawn for all at once.

    The steps before it make its input (DMD2's backward simulation), and pass no
    gradients.
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
          params, x, jnp.full(len(x), levels[k]), labels
      )

    def step(k, x):
      clean = denoise(jax.lax.stop_gradient(params), x, k)
      return clean + levels[k + 1] * noise(k + 1)

    x = jax.lax.fori_loop(0, m, step, levels[0] * noise(0))
    return denoise(params, jax.lax.stop_gradient(x), m)

  def labels(self, ctx: base.Context) -> jax.Array | None:
    """Classes of the images to generate, uniform and independent of data."""
    if ctx.labels is None:
      return None
    classes = self.network.num_classes
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, classes))(
        ctx.keys("generator/label")
    )

  def levels(self, ctx: base.Context, stream: str, low: float, high: float):
    """Levels [B], uniform in sigma^(1 / rho) between two shares of the range,
    counted from sigma_min."""
    v = jax.vmap(jax.random.uniform)(ctx.keys(f"{stream}/sigma"))
    return _karras(1 - (low + v * (high - low)), self).astype(ctx.images.dtype)

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """What mode inspect tells of the levels."""
    return {
        "sigma of the gradient": self.levels(ctx, "dm", _LOW, _HIGH),
        "sigma of the fake score": self.levels(ctx, "fake", 0.0, 1.0),
    }

  def gradient(self, ctx: base.Context, x, labels) -> jax.Array:
    """grad [B, H, W, C] of images x, of no gradient itself."""
    sigma = self.levels(ctx, "dm", _LOW, _HIGH)
    z = process.normal_like(ctx.keys("dm/noise"), x)
    x_s = process.add_noise(x, sigma, z)
    real = self.teacher.denoise(ctx.frozen["teacher"], x_s, sigma, labels)
    fake = self.denoiser.denoise(
        ctx.networks["fake_score"]["network"], x_s, sigma, labels
    )
    size = jnp.mean(jnp.abs(x - real), axis=(1, 2, 3))
    factor = {
        "normalised": lambda: 1 / jnp.maximum(size, _FLOOR),
        "sigma": lambda: 1 / sigma, "sigma3": lambda: sigma,
        "none": lambda: jnp.ones_like(sigma),
    }[self.dm_weight]()
    return jax.lax.stop_gradient(
        process.expand(factor, x.ndim) * (fake - real)
    )

  def student_loss(self, params, ctx: base.Context):
    """The generator's loss [B] and its parts."""
    labels = self.labels(ctx)
    x = self.generate(params, ctx, labels)
    goal = jax.lax.stop_gradient(
        x - self.gradient(ctx, jax.lax.stop_gradient(x), labels)
    )
    parts = {"loss_dm": distances.l2(x, goal) / 2}
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
    """d [B] between G and the teacher's solver, on pairs."""
    start = self.sigma_max * ctx.extra["noise"].astype(ctx.images.dtype)
    sigma = jnp.full(len(start), self.sigma_max, start.dtype)
    x = self.denoiser.denoise(params, start, sigma, ctx.labels)
    return cd.distance(self, x, ctx.images, ctx)

  # mu_fake --------------------------------------------------------------------

  def logits(self, fake, images, labels, ctx: base.Context, stream: str):
    """Logits [B, heads] by mu_fake's parameters."""
    return self.discriminator(
        fake["head"], fake["network"], images, labels, ctx, stream
    )

  def fake_loss(self, params, ctx: base.Context):
    """mu_fake's loss [B]: denoising of what the generator makes, and telling
    it from real images."""
    labels = self.labels(ctx)
    x = jax.lax.stop_gradient(
        self.generate(ctx.networks["student"], ctx, labels)
    )
    sigma = self.levels(ctx, "fake", 0.0, 1.0)
    z = process.normal_like(ctx.keys("fake/noise"), x)
    d = self.denoiser.denoise(
        params["network"], process.add_noise(x, sigma, z), sigma, labels
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
  """Level at a share of the way from sigma_max down, even in sigma^(1/rho)."""
  high, low = (
      s ** (1 / method.rho) for s in (method.sigma_max, method.sigma_min)
  )
  return (high + share * (low - high)) ** method.rho


def _with_head(source, fresh):
  """mu_fake from the teacher's parameters; the head stays fresh."""
  return fresh | {"network": source}
