"""Consistency trajectory models (CTM; Kim et al., 2024).

G(x, t, s) jumps down the ODE from level t to any lower s, and its inner part
g(x, t, t) is a denoiser. With theta- a moving average of theta,

  estimate = G_theta-( G_theta(x_t, t, s), s, 0 )
  target   = G_theta-( G_sg(theta)(x_u, u, s), s, 0 ),
             x_u = h steps of the teacher's solver down from x_t
  L_CTM = d(estimate, target)
  L_DSM = w(sigma) |g_theta(x_sigma, sigma, sigma) - x_0|^2
  L_GAN = -D(estimate)

and L = L_CTM + lambda_DSM L_DSM + lambda_GAN L_GAN, the weights such that the
gradients of all three are as long in one convolution near the output. s = 0 is
sigma_min throughout.

Unlike the released code, weights are those of the global batch, not of each
device's, and all devices share one discriminator: there gradients of it were
not reduced, so that every device trained its own.
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
from bcm_jax.diffusion import solvers
from bcm_jax.methods import base
from bcm_jax.methods import cd
from bcm_jax.methods import ctm_levels
from bcm_jax.methods import edm
from bcm_jax.methods import flow_map
from bcm_jax.methods import gan as adversarial
from bcm_jax.methods import projected
from bcm_jax.models import discriminator
from bcm_jax.models import end_time

# Weights of the released code: floor of the denominator, and bounds.
_EPSILON, _MOST, _GAN_BOUNDS = 1e-4, 1e4, (0.01, 10.0)


@dataclasses.dataclass(frozen=True)
class TrajectoryDistillation(
    ctm_levels.TrajectoryLevels, flow_map.NetworkMap
):
  """The losses above; the defaults are the released CIFAR-10 settings.

  Attributes:
    network, scalings, noise: of G; scalings are the 'ctm' form.
    sigma_data, sigma_min, sigma_max, rho: data spread and Karras grid.
    num_levels: N, levels of the grid.
    max_solver_steps: M, most teacher steps from t to u.
    solver_steps_law: of h in 1 .. M: 'weighted' (P(h) ~ h), 'uniform' or
      'fixed' (M).
    end_law: of s: 'uniform' over the levels from u down, or 'smallest'.
    teacher: the frozen denoiser; None learns from scratch, x_u =
      G_theta-(x_t, t, u).
    target_mu: rate of theta-.
    target_inner: the target's first jump by 'online' (released) or 'average'
      parameters (paper), or 'none': one jump of theta- from x_u.
    metric, huber_c, feature_sigma, lpips_path, lpips_pooling: d, as in
      distillation.
    dsm_weight: of L_DSM; 0 leaves it out.
    p_mean, p_std, dsm_high_share: levels of L_DSM: log-normal for one half of
      the batch; the other's are uniform in sigma^(1 / rho), over this share of
      the range, counted from sigma_max.
    adaptive: weigh terms by their gradients; False takes the plain weights.
    gan: train a discriminator along.
    gan_weight: of L_GAN.
    gan_start: step before which it does not play.
    gan_period: steps of a round: in the last one the discriminator's turn.
    gan_own_times: draw new levels for L_GAN (released on ImageNet-64).
    gan_max_solver_steps: M of these.
    gan_encoder: whose features are judged; None is the teacher's encoder.
    gan_sigma_max: of a denoiser's encoder; others see images without noise.
    gan_levels, gan_features, gan_augment: see adversarial and discriminator.
    end_init: the second time branch starts at 'zero' (G starts as the teacher's
      Euler step) or 'random' (released).
  """

  network: nn.Module
  scalings: preconditioning.Preconditioning
  noise: Callable[[jax.Array], jax.Array] = preconditioning.edm_noise
  teacher: edm.Diffusion | None = dataclasses.field(kw_only=True)
  sigma_data: float = 0.5
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  num_levels: int = 18
  max_solver_steps: int = 17
  solver_steps_law: Literal["weighted", "uniform", "fixed"] = "weighted"
  end_law: Literal["uniform", "smallest"] = "uniform"
  target_mu: float = 0.999
  target_inner: Literal["online", "average", "none"] = "online"
  metric: Literal["pseudo_huber", "l2", "l1", "features", "lpips"] = "features"
  huber_c: float | None = None
  feature_sigma: float = 0.05
  lpips_path: tuple[str, ...] = ()
  lpips_pooling: Literal["max", "average"] = "average"
  dsm_weight: float = 1.0
  p_mean: float = -1.2
  p_std: float = 1.2
  dsm_high_share: float = 0.7
  adaptive: bool = True
  gan: bool = False
  gan_weight: float = 1.0
  gan_start: int = 0
  gan_period: int = 2
  gan_own_times: bool = False
  gan_max_solver_steps: int = 17
  gan_encoder: projected.Projected | None = dataclasses.field(
      default_factory=lambda: None  # No default: no number of a config.
  )
  gan_sigma_max: float = 80.0
  gan_levels: tuple[int, ...] = ()
  gan_features: int | None = None
  gan_augment: bool = True
  end_init: Literal["zero", "random"] = "zero"

  sampled_network = "student"
  supports_inversion = False
  is_denoiser = False

  # What it declares -----------------------------------------------------------

  @property
  def terms(self) -> tuple[str, ...]:
    """Names of the student's terms."""
    names = ["ctm"]
    names += ["dsm"] if self.dsm_weight else []
    names += ["gan"] if self.gan else []
    return tuple(names)

  @property
  def networks(self) -> Mapping[str, base.TrainableNetwork]:
    """The student, and the discriminator if there is one."""
    networks = {"student": base.TrainableNetwork(
        self.network, self.init, self.load_pretrained,
        init_from=None if self.teacher is None else "teacher",
        adaptive_weight=base.AdaptiveWeight(
            self.terms, self.network.last_layer, self.loss_weights
        ) if self.adaptive else None,
    )}
    if self.gan:
      networks["discriminator"] = base.TrainableNetwork(
          self.discriminator.heads, self.discriminator.init
      )
    return networks

  @property
  def discriminator(self) -> adversarial.Discriminator:
    """The discriminator."""
    heads = discriminator.Heads(self.gan_levels, self.gan_features)
    if self.gan_encoder is not None:
      return adversarial.Discriminator(
          self.gan_encoder, heads, None, self.gan_augment
      )
    return adversarial.Discriminator(
        self.teacher, heads, self.gan_sigma_max, self.gan_augment
    )

  def discriminate(
      self, params, images, ctx: base.Context, stream: str
  ) -> jax.Array:
    """Logits [B, heads] of images by the discriminator's parameters."""
    encoder = "teacher" if self.gan_encoder is None else "gan_encoder"
    return self.discriminator(
        params, ctx.frozen[encoder], images, ctx.labels, ctx, stream
    )

  @property
  def losses(self) -> Mapping[str, base.Loss]:
    """By network."""
    losses = {"student": self.student_loss}
    if self.gan:
      losses["discriminator"] = self.discriminator_loss
    return losses

  @property
  def averages(self) -> Mapping[str, base.Average]:
    """theta-."""
    return {"target": base.Average("student", "target_ema_rate")}

  def phase(self, step: int) -> tuple[str, ...]:
    """The student's turn, and the discriminator's once a round."""
    if self.gan and step >= self.gan_start:
      if step % self.gan_period == self.gan_period - 1:
        return ("discriminator",)
    return ("student",)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Both turns."""
    return tuple((name,) for name in self.networks)

  def curriculum(self, step: int) -> dict[str, Any]:
    """theta-'s rate, and whether the discriminator plays."""
    return {
        "target_ema_rate": jnp.float32(self.target_mu),
        "gan": jnp.float32(self.gan and step >= self.gan_start),
    }

  def load_pretrained(self, source, fresh):
    """Starts from the teacher; parameters that have s already stay."""
    return end_time.add_end(source, fresh, self.end_init == "zero")

  def loss_weights(
      self, norms: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """lambda by term, from the gradients' norms: VQGAN's rule."""
    weights = {"ctm": jnp.ones(()), "dsm": self.dsm_weight,
               "gan": self.gan_weight}
    bounds = {"dsm": (0.0, _MOST), "gan": _GAN_BOUNDS}
    if self.adaptive:
      for name in bounds:
        if name in norms:
          ratio = norms["ctm"] / (norms[name] + _EPSILON)
          weights[name] *= jnp.clip(ratio, *bounds[name])
    return {name: jnp.asarray(weights[name]) for name in norms}

  # Jumps ----------------------------------------------------------------------

  def denoise(self, params, x, sigma, labels, dropout_keys=None) -> jax.Array:
    """g(x, sigma, sigma), the denoiser inside G."""

    def network(x, c_noise, c_noise_end):
      del c_noise_end
      return self.network.apply(
          {"params": params}, x, c_noise, c_noise, labels, dropout_keys
      )

    return preconditioning.precondition(
        network, preconditioning.EDM(self.sigma_data), x, sigma, sigma,
        self.noise,
    )

  def solve(self, ctx: base.Context, x_t, times) -> jax.Array:
    """x_u [B, ...]: h Heun steps of the teacher, or theta-'s own jump."""
    if self.teacher is None:
      return self.f(
          ctx.averages["target"], x_t, times.t, times.u, ctx.labels,
          ctx.keys("dropout/solver"),
      )
    grid = self.grid.astype(x_t.dtype)

    def denoiser(x, s):
      return self.teacher.denoise(
          ctx.frozen["teacher"], x, s.reshape(-1), ctx.labels
      )

    def step(k, x):
      t, after = (
          process.expand(grid[times.index + k + i], x.ndim) for i in (0, 1)
      )
      return solvers.heun_step(denoiser, x, t, after)

    return jax.lax.fori_loop(0, times.solver_steps, step, x_t)

  def jump_to_zero(self, ctx: base.Context, x, s, stream: str) -> jax.Array:
    """G_theta-(x, s, 0); gradients flow to x alone."""
    return self.f(
        ctx.averages["target"], x, s, jnp.full_like(s, self.sigma_min),
        ctx.labels, ctx.keys(f"dropout/{stream}"),
    )

  def estimate(self, params, ctx: base.Context, x_t, times) -> jax.Array:
    """G_theta-(G_theta(x_t, t, s), s, 0)."""
    y = self.f(
        params, x_t, times.t, times.s, ctx.labels, ctx.keys("dropout/student")
    )
    return self.jump_to_zero(ctx, y, times.s, "estimate")

  def target(self, params, ctx: base.Context, x_t, times) -> jax.Array:
    """G_theta-(G(x_u, u, s), s, 0), stop-gradiented."""
    x_u = jax.lax.stop_gradient(self.solve(ctx, x_t, times))
    if self.target_inner == "none":
      return self.jump_to_zero(ctx, x_u, times.u, "target_end")
    inner = params if self.target_inner == "online" else ctx.averages["target"]
    y = self.f(
        jax.lax.stop_gradient(inner), x_u, times.u, times.s, ctx.labels,
        ctx.keys("dropout/target"),
    )
    y = self.jump_to_zero(ctx, y, times.s, "target_end")
    return jax.lax.stop_gradient(y)

  def distance(self, a, b, ctx: base.Context) -> jax.Array:
    """d(a, b) for [B, ...] twice -> [B]."""
    return cd.distance(self, a, b, ctx)

  # Losses ---------------------------------------------------------------------

  def sample_x_t(
      self, ctx: base.Context, t, stream: str = "noise"
  ) -> jax.Array:
    """x_t."""
    z = process.normal_like(ctx.keys(stream), ctx.images)
    return process.add_noise(ctx.images, t, z)

  def dsm_term(self, params, ctx: base.Context) -> jax.Array:
    """L_DSM [B]."""
    sigma = self.dsm_levels(ctx).astype(ctx.images.dtype)
    d = self.denoise(
        params, self.sample_x_t(ctx, sigma, "dsm/noise"), sigma, ctx.labels,
        ctx.keys("dropout/dsm"),
    )
    weight = preconditioning.edm_weight(sigma, self.sigma_data)
    return weight * distances.l2(d, ctx.images)

  def student_loss(self, params, ctx: base.Context):
    """The student's terms, [B] each, or their sum where nothing adapts."""
    times = self.sample_times(ctx)
    x_t = self.sample_x_t(ctx, times.t)
    estimate = self.estimate(params, ctx, x_t, times)
    target = self.target(params, ctx, x_t, times)
    terms = {"ctm": self.distance(estimate, target, ctx)}
    if self.dsm_weight:
      terms["dsm"] = self.dsm_term(params, ctx)
    if self.gan:
      fake = estimate
      if self.gan_own_times:
        fake = self._fake(params, ctx)
      logits = self.discriminate(
          ctx.networks["discriminator"], fake, ctx, "generator"
      )
      terms["gan"] = (
          ctx.curriculum["gan"] * adversarial.hinge_generator(logits)
      )
    if self.adaptive:
      return terms, {}
    weights = self.loss_weights(terms)
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {f"loss_{name}": term for name, term in terms.items()}

  def _fake(self, params, ctx: base.Context) -> jax.Array:
    """A generated image: the estimate, at the levels that L_GAN draws."""
    times = self.sample_times(ctx, gan=self.gan_own_times)
    return self.estimate(params, ctx, self.sample_x_t(ctx, times.t), times)

  def discriminator_loss(self, params, ctx: base.Context):
    """Hinge loss [B] of the discriminator, and its logits."""
    fake = jax.lax.stop_gradient(self._fake(ctx.networks["student"], ctx))
    logits = {
        name: self.discriminate(params, images, ctx, name)
        for name, images in (("fake", fake), ("real", ctx.images))
    }
    loss = adversarial.hinge_discriminator(**logits)
    return loss, {f"logit_{k}": v.mean(axis=-1) for k, v in logits.items()}
