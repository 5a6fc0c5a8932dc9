"""Consistency trajectory models (CTM; Kim et al., 2024, section 3).

G(x, t, s) = (s/t) x + (1 - s/t) g(x, t, s) maps from level t to any lower level
s along the ODE, and g(x, t, t) is a denoiser. theta- is an EMA of theta.

  estimate = G_theta-( G_theta(x_t, t, s), s, 0 )
  target   = G_theta-( G_sg(theta)(x_u, u, s), s, 0 ),
             x_u = h steps of the teacher's solver down from x_t
  L_CTM = d(estimate, target)                                  (CTM loss)
  L_DSM = w(sigma) |g_theta(x_sigma, sigma, sigma) - x_0|^2     (DSM loss)
  L_GAN = -D(estimate)                                         (GAN loss)

The total loss is L = L_CTM + lambda_DSM L_DSM + lambda_GAN L_GAN with adaptive
weights (VQGAN): the gradients of the three terms have the same norm in the last
layer. s = 0 means sigma_min throughout, as in the released code.

The inner jump of the target differs between released code and paper, see
target_inner. Unlike the released code, the weights are computed on the global
batch instead of each device's microbatch, and all devices share one
discriminator.
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

# Adaptive weights of the released code: epsilon of the denominator and bounds.
_EPSILON, _MAX_WEIGHT, _GAN_BOUNDS = 1e-4, 1e4, (0.01, 10.0)


class Times(NamedTuple):
  """Noise levels s <= u < t of a batch, [B] each.

  Attributes:
    t: start level of the estimate.
    u: start level of the target.
    s: end level of both jumps.
    index: position of t in the grid; 0 is sigma_max.
    solver_steps: h, number of grid steps from t to u; a scalar, the same for
      all examples.
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
  """The losses of the module docstring; defaults: released CIFAR-10 settings.

  Attributes:
    num_levels: N, number of levels of the grid.
    inner_preconditioning: preconditioning of g: 'edm', 'cm' or 'none', of
      preconditioning='ctm'.
    outer_skip: factor of x in G, see diffusion.preconditioning.Trajectory.
    max_solver_steps: M, maximum number of teacher steps from t to u.
    solver_steps_law: distribution of h in 1 .. M: 'weighted' (P(h) ~ h),
      'uniform' or 'fixed' (h = M).
    end_law: distribution of s: 'uniform' over the levels from u down, or
      'smallest' (sigma_min).
    teacher: frozen denoiser; None trains from scratch with x_u =
      G_theta-(x_t, t, u).
    target_mu: EMA rate of theta-.
    target_inner: parameters of the target's inner jump: 'online' (released
      code) or 'average' (paper); 'none' replaces both jumps by one of theta-
      from x_u.
    dsm_weight: weight of L_DSM; 0 omits it.
    p_mean: mean of ln sigma in L_DSM, for one half of the batch.
    p_std: standard deviation of ln sigma in L_DSM.
    dsm_high_share: levels of the other half are uniform in sigma^(1 / rho) over
      this fraction of the range, from sigma_max down.
    adaptive: whether to use adaptive weights; False uses constant ones.
    gan: whether to train a discriminator.
    gan_weight: weight of L_GAN.
    gan_start: first step of GAN training.
    gan_period: the discriminator is updated instead of the student in every
      gan_period-th step.
    gan_own_times: whether to draw separate levels for L_GAN (released on
      ImageNet-64).
    gan_max_solver_steps: M of these levels.
    gan_encoder: feature network of the discriminator; None is the encoder of
      the teacher.
    gan_sigma_max: maximum noise level of images for the teacher's encoder; for
      other encoders images have no noise.
    gan_levels: levels of features with heads, see discriminator.Heads.
    gan_features: width of the heads, see discriminator.Heads.
    gan_augment: whether to use DiffAugment, see gan.
    end_init: initialization of the second time branch: 'zero' (G is an Euler
      step of the teacher) or 'random' (released code).
  """

  frozen = {
      "teacher": base.FrozenRun(_teacher_for), "lpips": cd.LPIPS,
      "gan_encoder": gan.ENCODER,
  }

  teacher: edm.Diffusion | None = base.frozen_field()
  gan_encoder: gan.Projected | None = base.frozen_field()
  preconditioning: base.PreconditioningName = "ctm"
  inner_preconditioning: Literal["edm", "cm", "none"] = "edm"
  outer_skip: base.OuterSkip = "euler"
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
    """Checks that the network has an end level in all blocks, and the distance.
    """
    if not config.model.get("two_time") or config.model.end_branch != "blocks":
      return (
          f"model.end_branch: got {config.model.get('end_branch')!r} with "
          f"model.two_time={config.model.get('two_time')}, expected an end "
          f"level in every block for method.name={config.method.name!r}; set "
          "model.two_time=True and model.end_branch='blocks'"
      )
    encoder = config.method.gan_encoder
    if config.data.augment and config.method.gan and encoder != "teacher":
      return (
          f"method.gan_encoder: got {encoder!r} with data.augment="
          f"{config.data.augment}, expected 'teacher', since no other encoder "
          "has augmentation labels, without which the network generates "
          "augmented images; change one of them"
      )
    return cls.distance_constraints(config)

  # Networks -------------------------------------------------------------------

  @property
  def networks(self) -> Mapping[str, base.TrainableNetwork]:
    """The student and, with gan, the discriminator."""
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
    """Adds the end level s to the teacher's parameters, unless they have it."""
    return end_time.add_end(source, fresh, self.end_init == "zero")

  @property
  def discriminator(self) -> "gan.Discriminator":
    """The discriminator on the teacher's encoder or on gan_encoder."""
    heads = discriminator.Heads(self.gan_levels, self.gan_features)
    if self.gan_encoder is not None:
      return gan.Discriminator(self.gan_encoder, heads, None, self.gan_augment)
    return gan.Discriminator(
        self.teacher, heads, self.gan_sigma_max, self.gan_augment
    )

  def discriminate(self, params, images, ctx: base.Context, stream: str):
    """Returns logits [B, heads] of images [B, H, W, C].

    Args:
      params: parameters of the heads.
      images: real or generated images in [-1, 1].
      ctx: frozen encoder and keys.
      stream: name of the random stream.
    """
    encoder = "teacher" if self.gan_encoder is None else "gan_encoder"
    return self.discriminator(
        params, ctx.frozen[encoder], images, ctx.labels, ctx, stream
    )

  @property
  def losses(self) -> Mapping[str, base.Loss]:
    """Losses of the student and the discriminator."""
    losses = {"student": self.student_loss}
    if self.gan:
      losses["discriminator"] = self.discriminator_loss
    return losses

  @property
  def averages(self) -> Mapping[str, base.Average]:
    """The target network theta-."""
    return {"target": base.Average("student", "target_ema_rate")}

  def phase(self, step: int) -> tuple[str, ...]:
    """Returns the discriminator in every gan_period-th step, else the student.
    """
    is_last = step % self.gan_period == self.gan_period - 1
    if self.gan and step >= self.gan_start and is_last:
      return ("discriminator",)
    return ("student",)

  def phases(self) -> tuple[tuple[str, ...], ...]:
    """Returns one phase per network."""
    return tuple((name,) for name in self.networks)

  def curriculum(self, step: int) -> dict[str, Any]:
    """Returns the EMA rate of theta- and a factor 0 or 1 on L_GAN."""
    return {
        "target_ema_rate": jnp.float32(self.target_mu),
        "gan": jnp.float32(self.gan and step >= self.gan_start),
    }

  def loss_weights(self, norms) -> dict[str, jax.Array]:
    """Returns {term: lambda} from {term: gradient norm} (VQGAN, eq. 7)."""
    weights = {"ctm": jnp.ones(()), "dsm": self.dsm_weight,
               "gan": self.gan_weight}
    bounds = {"dsm": (0.0, _MAX_WEIGHT), "gan": _GAN_BOUNDS}
    if self.adaptive:
      for name in bounds:
        if name in norms:
          ratio = norms["ctm"] / (norms[name] + _EPSILON)
          weights[name] *= jnp.clip(ratio, *bounds[name])
    return {name: jnp.asarray(weights[name]) for name in norms}

  # Levels ---------------------------------------------------------------------

  @property
  def grid(self) -> jax.Array:
    """Karras grid [N], descending from sigma_max."""
    ascending = schedules.karras_sigmas(
        self.num_levels, self.sigma_min, self.sigma_max, self.rho
    )
    return jnp.asarray(ascending[::-1])

  def sample_times(self, ctx: base.Context, gan: bool = False) -> Times:
    """Draws one h for the batch and t, u, s for every example.

    Args:
      ctx: keys.
      gan: whether the levels are those of L_GAN.
    """
    stream = "gan/" if gan else ""
    law = "uniform" if gan else self.solver_steps_law
    m = self.gan_max_solver_steps if gan else self.max_solver_steps
    n = self.num_levels
    m = min(m, n - 1)
    v = jax.random.uniform(ctx.shared_key(f"{stream}solver_steps"))
    if law == "weighted":  # Inverts the CDF h (h + 1) / (M (M + 1)).
      h = jnp.ceil((jnp.sqrt(1 + 4 * v * m * (m + 1)) - 1) / 2)
    else:
      h = jnp.ceil(v * m) if law == "uniform" else jnp.asarray(m)
    h = jnp.clip(h, 1, m).astype(jnp.int32)
    draw = jax.vmap(jax.random.uniform)
    i = _uniform_index(draw(ctx.keys(f"{stream}t")), 0, n - 1 - h)
    j = jnp.full_like(i, n - 1)
    if self.end_law == "uniform":
      j = _uniform_index(draw(ctx.keys(f"{stream}s")), i + h, n - 1)
    grid = self.grid.astype(ctx.images.dtype)
    return Times(grid[i], grid[i + h], grid[j], i, h)

  def dsm_levels(self, ctx: base.Context) -> jax.Array:
    """Draws levels of L_DSM [B].

    Even positions of the global batch have log-normal levels, odd positions
    levels that are uniform in sigma^(1 / rho).
    """
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
    """Draws noise levels by name, for the report of mode inspect."""
    times = self.sample_times(ctx)
    return {
        "t, start of the student": times.t,
        "u, end of the teacher": times.u,
        "s, end of both jumps": times.s,
        "sigma of L_DSM": self.dsm_levels(ctx),
    }

  # Jumps ----------------------------------------------------------------------

  @property
  def coefficients(self) -> base.Preconditioning:
    """Preconditioning: (t, u) -> c_skip, c_out and c_in."""
    if self.preconditioning != "ctm":
      return super().coefficients
    inner = {
        "edm": preconditioning.EDM(self.sigma_data),
        "cm": preconditioning.ConsistencyBoundary(
            self.sigma_data, self.sigma_min
        ),
        "none": preconditioning.Plain(self.sigma_data),
    }[self.inner_preconditioning]
    return preconditioning.Trajectory(
        inner, self.outer_skip, self.sigma_data, self.sigma_min
    )

  def denoise(
      self, params, x, sigma, labels, dropout_keys=None, augment_labels=None
  ) -> jax.Array:
    """Returns the denoiser inside G [B, H, W, C]; by default g(x, t, t)."""
    network = self.apply_network(params, labels, dropout_keys, augment_labels)
    form = preconditioning.EDM(self.sigma_data)
    if self.preconditioning == "ctm":
      form = self.coefficients.denoiser
    return preconditioning.precondition(
        lambda x, c_noise, _: network(x, c_noise, c_noise),
        form, x, sigma, sigma, self.c_noise,
    )

  def solve(self, ctx: base.Context, x_t, times) -> jax.Array:
    """Returns x_u [B, H, W, C]: h Heun steps of the teacher from x_t.

    Without a teacher it is G_theta-(x_t, t, u).
    """
    if self.teacher is None:
      return self.f(
          ctx.averages["target"], x_t, times.t, times.u, ctx.labels,
          ctx.keys("dropout/solver"), ctx.augment_labels,
      )
    grid = self.grid.astype(x_t.dtype)
    denoiser = self.teacher.solver_denoiser(
        ctx.frozen["teacher"], ctx.labels, ctx.augment_labels
    )

    def step(k, x):
      t, t_next = (
          process.expand(grid[times.index + k + i], x.ndim) for i in (0, 1)
      )
      return solvers.heun_step(denoiser, x, t, t_next)

    return jax.lax.fori_loop(0, times.solver_steps, step, x_t)

  def jump_to_zero(self, ctx: base.Context, x, s, stream: str) -> jax.Array:
    """Returns G_theta-(x, s, 0) [B, H, W, C]; gradients flow only to x."""
    return self.f(
        ctx.averages["target"], x, s, jnp.full_like(s, self.sigma_min),
        ctx.labels, ctx.keys(f"dropout/{stream}"), ctx.augment_labels,
    )

  def sample_x_t(self, ctx: base.Context, t, stream="noise") -> jax.Array:
    """Returns x_t = x_0 + t z [B, H, W, C]."""
    z = process.normal_like(ctx.keys(stream), ctx.images)
    return process.add_noise(ctx.images, t, z)

  # Losses ---------------------------------------------------------------------

  def estimate(self, params, ctx: base.Context, x_t, times) -> jax.Array:
    """Returns the estimate G_theta-(G_theta(x_t, t, s), s, 0) [B, H, W, C]."""
    y = self.f(
        params, x_t, times.t, times.s, ctx.labels,
        ctx.keys("dropout/student"), ctx.augment_labels,
    )
    return self.jump_to_zero(ctx, y, times.s, "estimate")

  def target(self, params, ctx: base.Context, x_t, times) -> jax.Array:
    """Returns the target G_theta-(G(x_u, u, s), s, 0), stop-gradiented.

    See target_inner for the parameters of the inner jump.
    """
    x_u = jax.lax.stop_gradient(self.solve(ctx, x_t, times))
    if self.target_inner == "none":
      return self.jump_to_zero(ctx, x_u, times.u, "target_end")
    inner = params if self.target_inner == "online" else ctx.averages["target"]
    y = self.f(
        jax.lax.stop_gradient(inner), x_u, times.u, times.s, ctx.labels,
        ctx.keys("dropout/target"), ctx.augment_labels,
    )
    y = self.jump_to_zero(ctx, y, times.s, "target_end")
    return jax.lax.stop_gradient(y)

  def dsm_term(self, params, ctx: base.Context) -> jax.Array:
    """Returns L_DSM [B], the denoising loss of g(x, sigma, sigma)."""
    sigma = self.dsm_levels(ctx).astype(ctx.images.dtype)
    d = self.denoise(
        params, self.sample_x_t(ctx, sigma, "dsm/noise"), sigma, ctx.labels,
        ctx.keys("dropout/dsm"), ctx.augment_labels,
    )
    weight = preconditioning.edm_weight(sigma, self.sigma_data)
    return weight * distances.l2(d, ctx.images)

  def student_loss(self, params, ctx: base.Context):
    """Returns {term: loss [B]}; with constant weights the weighted sum [B]."""
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
    """Returns generated images [B, H, W, C]: estimates at the GAN levels."""
    times = self.sample_times(ctx, gan=self.gan_own_times)
    return self.estimate(params, ctx, self.sample_x_t(ctx, times.t), times)

  def discriminator_loss(self, params, ctx: base.Context):
    """Returns the hinge loss [B] of the discriminator, and mean logits."""
    fake = jax.lax.stop_gradient(self.fake(ctx.networks["student"], ctx))
    logits = {
        name: self.discriminate(params, images, ctx, name)
        for name, images in (("fake", fake), ("real", ctx.images))
    }
    loss = gan.hinge_discriminator(**logits)
    return loss, {f"logit_{k}": v.mean(axis=-1) for k, v in logits.items()}


def _uniform_index(uniform, low, high) -> jax.Array:
  """Returns integers in low .. high [B] from uniform draws in [0, 1)."""
  count = high - low + 1
  return low + jnp.minimum(jnp.floor(uniform * count), count - 1).astype(
      jnp.int32
  )
