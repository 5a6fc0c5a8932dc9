"""Consistency trajectory models (CTM; Kim et al., 2024, section 3).

G(x, t, s) = (s/t) x + (1 - s/t) g(x, t, s) jumps down the ODE from level t to
any lower s, and g(x, t, t) is a denoiser. theta- is a moving average of theta.

  estimate = G_theta-( G_theta(x_t, t, s), s, 0 )
  target   = G_theta-( G_sg(theta)(x_u, u, s), s, 0 ),
             x_u = h steps of the teacher's solver down from x_t
  L_CTM = d(estimate, target)                                  (CTM loss)
  L_DSM = w(sigma) |g_theta(x_sigma, sigma, sigma) - x_0|^2     (DSM loss)
  L_GAN = -D(estimate)                                         (GAN loss)

and L = L_CTM + lambda_DSM L_DSM + lambda_GAN L_GAN, the weights such that the
gradients of all three have the same norm in one convolution near the output.
s = 0 is sigma_min throughout, as in the released code.

Released code and paper differ in the target's inner jump (target_inner). Unlike
the released code, weights are computed on the global batch and not on each
device's microbatch, and all devices share one discriminator.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.methods import base
from bcm_jax.methods import cd
from bcm_jax.methods import edm
from bcm_jax.methods import gan
from bcm_jax.models import discriminator
from bcm_jax.models import end_time

# Weights of the released code: floor of the denominator, and bounds.
_EPSILON, _MOST, _GAN_BOUNDS = 1e-4, 1e4, (0.01, 10.0)


class Times(NamedTuple):
  """Levels s <= u < t of a batch, [B] each.

  Attributes:
    t, u, s: start of the student, start of the target, end of both.
    index: t's position in the grid, 0 the noisiest.
    solver_steps: h, grid steps from t to u; a scalar, one for all examples.
  """

  t: jax.Array
  u: jax.Array
  s: jax.Array
  index: jax.Array
  solver_steps: jax.Array


def _teacher_for(options) -> str | None:
  if options["gan"] and options["gan_encoder"] == "teacher":
    return "method.gan=True with method.gan_encoder='teacher'"
  return None


@dataclasses.dataclass(frozen=True)
class TrajectoryDistillation(
    cd.ImageDistance, base.PreconditionedNetwork, base.Method
):
  """The losses above; the defaults are the released CIFAR-10 settings.

  Attributes:
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
    dsm_weight: of L_DSM; 0 omits it.
    p_mean, p_std, dsm_high_share: levels of L_DSM: log-normal for one half of
      the batch; the other's are uniform in sigma^(1 / rho), over this share of
      the range, counted from sigma_max.
    adaptive: weights of terms from their gradients; False takes the plain ones.
    gan: train a discriminator too.
    gan_weight: of L_GAN.
    gan_start: first step of the discriminator.
    gan_period: steps of a round; the discriminator is updated in its last one.
    gan_own_times: draw new levels for L_GAN (released on ImageNet-64).
    gan_max_solver_steps: M of these.
    gan_encoder: features for the discriminator; None is the teacher's encoder.
    gan_sigma_max: of a denoiser's encoder; others see images without noise.
    gan_levels, gan_features, gan_augment: see gan and discriminator.
    end_init: the second time branch starts at 'zero' (G starts as the teacher's
      Euler step) or 'random' (released).
  """

  frozen = {
      "teacher": base.FrozenRun(_teacher_for), "lpips": cd.LPIPS,
      "gan_encoder": gan.ENCODER,
  }

  teacher: edm.Diffusion | None = base.frozen_field()
  gan_encoder: gan.Projected | None = base.frozen_field()
  preconditioning: base.PreconditioningName = "ctm"
  num_levels: int = 18
  max_solver_steps: int = 17
  solver_steps_law: Literal["weighted", "uniform", "fixed"] = "weighted"
  end_law: Literal["uniform", "smallest"] = "uniform"
  target_mu: float = 0.999
  target_inner: Literal["online", "average", "none"] = "online"
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
  gan_sigma_max: float = 80.0
  gan_levels: tuple[int, ...] = ()
  gan_features: int | None = None
  gan_augment: bool = True
  end_init: Literal["zero", "random"] = "zero"

  title = "consistency trajectory model"
  paper = "Kim et al., 2024"
  auxiliary_networks = True
  @classmethod
  def constraints(cls, config):
    """Returns what the network or the distance lacks, or None."""
    if not config.model.get("two_time") or config.model.end_branch != "blocks":
      return (
          f"method.name={config.method.name!r} needs a network with an end "
          "level in every block; set model.two_time=True and "
          "model.end_branch='blocks'"
      )
    return cls.distance_constraints(config)

  # Networks -------------------------------------------------------------------

  @property
  def networks(self) -> Mapping[str, base.TrainableNetwork]:
    """The student, and the discriminator if there is one."""
    terms = (
        "ctm", *(["dsm"] if self.dsm_weight else []),
        *(["gan"] if self.gan else []),
    )
    networks = {"student": base.TrainableNetwork(
        self.network, self.init, self.load_pretrained,
        init_from=None if self.teacher is None else "teacher",
        adaptive_weight=base.AdaptiveWeight(
            terms, self.network.last_layer, self.loss_weights
        ) if self.adaptive else None,
    )}
    if self.gan:
      networks["discriminator"] = base.TrainableNetwork(
          self.discriminator.heads, self.discriminator.init
      )
    return networks

  def load_pretrained(self, source, fresh):
    """Starts from the teacher; parameters that have s already stay."""
    return end_time.add_end(source, fresh, self.end_init == "zero")

  @property
  def discriminator(self) -> "gan.Discriminator":
    """Heads on the teacher's encoder, or on the user's network."""
    heads = discriminator.Heads(self.gan_levels, self.gan_features)
    if self.gan_encoder is not None:
      return gan.Discriminator(self.gan_encoder, heads, None, self.gan_augment)
    return gan.Discriminator(
        self.teacher, heads, self.gan_sigma_max, self.gan_augment
    )

  def discriminate(self, params, images, ctx: base.Context, stream: str):
    """Returns logits [B, heads] of images by the discriminator's parameters."""
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
    """The student's turn, or the discriminator's, once per round."""
    turn = step % self.gan_period == self.gan_period - 1
    if self.gan and step >= self.gan_start and turn:
      return ("discriminator",)
    return ("student",)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Both turns."""
    return tuple((name,) for name in self.networks)

  def curriculum(self, step: int) -> dict[str, Any]:
    """theta-'s rate, and whether L_GAN counts."""
    return {
        "target_ema_rate": jnp.float32(self.target_mu),
        "gan": jnp.float32(self.gan and step >= self.gan_start),
    }

  def loss_weights(self, norms) -> dict[str, jax.Array]:
    """lambda by term, from the norms of the gradients: VQGAN's rule."""
    weights = {"ctm": jnp.ones(()), "dsm": self.dsm_weight,
               "gan": self.gan_weight}
    bounds = {"dsm": (0.0, _MOST), "gan": _GAN_BOUNDS}
    if self.adaptive:
      for name in bounds:
        if name in norms:
          ratio = norms["ctm"] / (norms[name] + _EPSILON)
          weights[name] *= jnp.clip(ratio, *bounds[name])
    return {name: jnp.asarray(weights[name]) for name in norms}

  # Levels ---------------------------------------------------------------------

  @property
  def grid(self) -> jax.Array:
    """[N] levels, the noisiest first."""
    ascending = schedules.karras_sigmas(
        self.num_levels, self.sigma_min, self.sigma_max, self.rho
    )
    return jnp.asarray(ascending[::-1])

  def sample_times(self, ctx: base.Context, gan: bool = False) -> Times:
    """Draws h for all, and t, u, s for every example."""
    stream = "gan/" if gan else ""
    law = "uniform" if gan else self.solver_steps_law
    most = self.gan_max_solver_steps if gan else self.max_solver_steps
    n = self.num_levels
    most = min(most, n - 1)
    v = jax.random.uniform(ctx.shared_key(f"{stream}solver_steps"))
    if law == "weighted":  # Inverts h (h + 1) / (M (M + 1)).
      h = jnp.ceil((jnp.sqrt(1 + 4 * v * most * (most + 1)) - 1) / 2)
    else:
      h = jnp.ceil(v * most) if law == "uniform" else jnp.asarray(most)
    h = jnp.clip(h, 1, most).astype(jnp.int32)
    draw = jax.vmap(jax.random.uniform)
    i = _uniform_index(draw(ctx.keys(f"{stream}t")), 0, n - 1 - h)
    j = jnp.full_like(i, n - 1)
    if self.end_law == "uniform":
      j = _uniform_index(draw(ctx.keys(f"{stream}s")), i + h, n - 1)
    grid = self.grid.astype(ctx.images.dtype)
    return Times(grid[i], grid[i + h], grid[j], i, h)

  def dsm_levels(self, ctx: base.Context) -> jax.Array:
    """Draws levels of L_DSM: two laws, in turns along the global batch."""
    z = jax.vmap(jax.random.normal)(ctx.keys("dsm/normal"))
    v = self.dsm_high_share * jax.vmap(jax.random.uniform)(
        ctx.keys("dsm/uniform")
    )
    high, low = (s ** (1 / self.rho) for s in (self.sigma_max, self.sigma_min))
    return jnp.where(
        ctx.index % 2 == 0, jnp.exp(self.p_mean + self.p_std * z),
        (high + v * (low - high)) ** self.rho,
    )

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """Draws the levels that mode inspect shows."""
    times = self.sample_times(ctx)
    return {
        "t, start of the student": times.t,
        "u, end of the teacher": times.u,
        "s, end of both jumps": times.s,
        "sigma of L_DSM": self.dsm_levels(ctx),
    }

  # Jumps ----------------------------------------------------------------------

  def denoise(self, params, x, sigma, labels, dropout_keys=None) -> jax.Array:
    """Returns g(x, sigma, sigma), the denoiser inside G."""
    network = self.apply_network(params, labels, dropout_keys)
    return preconditioning.precondition(
        lambda x, c_noise, _: network(x, c_noise, c_noise),
        preconditioning.EDM(self.sigma_data), x, sigma, sigma, self.c_noise,
    )

  def solve(self, ctx: base.Context, x_t, times) -> jax.Array:
    """Returns x_u [B, ...]: h Heun steps of the teacher, or theta-'s jump."""
    if self.teacher is None:
      return self.f(
          ctx.averages["target"], x_t, times.t, times.u, ctx.labels,
          ctx.keys("dropout/solver"),
      )
    grid = self.grid.astype(x_t.dtype)
    denoiser = self.teacher.solver_denoiser(ctx.frozen["teacher"], ctx.labels)

    def step(k, x):
      t, after = (
          process.expand(grid[times.index + k + i], x.ndim) for i in (0, 1)
      )
      return solvers.heun_step(denoiser, x, t, after)

    return jax.lax.fori_loop(0, times.solver_steps, step, x_t)

  def jump_to_zero(self, ctx: base.Context, x, s, stream: str) -> jax.Array:
    """Returns G_theta-(x, s, 0); gradients flow only to x."""
    return self.f(
        ctx.averages["target"], x, s, jnp.full_like(s, self.sigma_min),
        ctx.labels, ctx.keys(f"dropout/{stream}"),
    )

  def sample_x_t(self, ctx: base.Context, t, stream="noise") -> jax.Array:
    """Returns x_0 + t z."""
    z = process.normal_like(ctx.keys(stream), ctx.images)
    return process.add_noise(ctx.images, t, z)

  # Losses ---------------------------------------------------------------------

  def estimate(self, params, ctx: base.Context, x_t, times) -> jax.Array:
    """Returns G_theta-(G_theta(x_t, t, s), s, 0)."""
    y = self.f(
        params, x_t, times.t, times.s, ctx.labels, ctx.keys("dropout/student")
    )
    return self.jump_to_zero(ctx, y, times.s, "estimate")

  def target(self, params, ctx: base.Context, x_t, times) -> jax.Array:
    """Returns G_theta-(G(x_u, u, s), s, 0), stop-gradiented."""
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

  def dsm_term(self, params, ctx: base.Context) -> jax.Array:
    """Returns L_DSM [B]."""
    sigma = self.dsm_levels(ctx).astype(ctx.images.dtype)
    d = self.denoise(
        params, self.sample_x_t(ctx, sigma, "dsm/noise"), sigma, ctx.labels,
        ctx.keys("dropout/dsm"),
    )
    weight = preconditioning.edm_weight(sigma, self.sigma_data)
    return weight * distances.l2(d, ctx.images)

  def student_loss(self, params, ctx: base.Context):
    """Returns the terms, [B] each; their sum if the weights are fixed."""
    times = self.sample_times(ctx)
    x_t = self.sample_x_t(ctx, times.t)
    estimate = self.estimate(params, ctx, x_t, times)
    target = self.target(params, ctx, x_t, times)
    terms = {"ctm": self.distance(estimate, target, ctx)}
    if self.dsm_weight:
      terms["dsm"] = self.dsm_term(params, ctx)
    if self.gan:
      fake = self.fake(params, ctx) if self.gan_own_times else estimate
      logits = self.discriminate(
          ctx.networks["discriminator"], fake, ctx, "generator"
      )
      terms["gan"] = ctx.curriculum["gan"] * gan.hinge_generator(logits)
    if self.adaptive:
      return terms, {}
    weights = self.loss_weights(terms)
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {f"loss_{name}": term for name, term in terms.items()}

  def fake(self, params, ctx: base.Context) -> jax.Array:
    """Returns generated images: the estimate at the levels of L_GAN."""
    times = self.sample_times(ctx, gan=self.gan_own_times)
    return self.estimate(params, ctx, self.sample_x_t(ctx, times.t), times)

  def discriminator_loss(self, params, ctx: base.Context):
    """Returns the hinge loss [B] of the discriminator, and its logits."""
    fake = jax.lax.stop_gradient(self.fake(ctx.networks["student"], ctx))
    logits = {
        name: self.discriminate(params, images, ctx, name)
        for name, images in (("fake", fake), ("real", ctx.images))
    }
    loss = gan.hinge_discriminator(**logits)
    return loss, {f"logit_{k}": v.mean(axis=-1) for k, v in logits.items()}


def _uniform_index(uniform, low, high) -> jax.Array:
  """Returns integers low .. high [B] from draws in [0, 1)."""
  count = high - low + 1
  return low + jnp.minimum(jnp.floor(uniform * count), count - 1).astype(
      jnp.int32
  )
