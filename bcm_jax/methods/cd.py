"""Consistency distillation: the path that f follows is a teacher's.

  L_CD = w(t) d( f_theta(x_t, t), f_target(x_r, r) ),
  x_r = one step of the teacher's ODE solver from x_t = x_0 + t z down to r

for adjacent levels r < t of a fixed grid: Song et al. (2023), eq. 6 and 7 and
algorithm 2. The distance may be LPIPS, as published, or one between the
teacher's own features, which needs no network trained on ImageNet.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import process
from bcm_jax.diffusion import solvers
from bcm_jax.interop.families import vgg_names
from bcm_jax.methods import base
from bcm_jax.methods import consistency
from bcm_jax.methods import edm
from bcm_jax.metrics import lpips

# Song et al.'s on CIFAR-10 except the distance: 18 levels, a target network.
CD = base.Preset(dict(
    discretization="fixed", s0=17, s1=17, time_distribution="uniform",
    metric="features", weighting="uniform", target_mu0=0.95,
))


# The denoiser that a student learns from.
TEACHER = base.FrozenRun(lambda options: f"method.name={options['name']!r}")


class _Lpips(NamedTuple):
  """LPIPS's networks, out of these files."""

  path: tuple[str, ...]

  def init(self, key, images, labels):
    del key, images, labels
    return vgg_names.load_lpips(*self.path)


LPIPS = base.FrozenNetwork(
    lambda options: (
        _Lpips(tuple(options["lpips_path"]))
        if options["metric"] == "lpips" else None
    ),
    path_keys=("lpips_path",),
)


@dataclasses.dataclass(frozen=True)
class ImageDistance:
  """d(a, b) between images, of a method with the field `teacher`.

  Attributes:
    metric: 'pseudo_huber', 'l2', 'l1', 'features' of the teacher, or 'lpips'.
    huber_c: width of the pseudo-Huber; None is iCT's 0.00054 sqrt(D).
    feature_sigma: level that the teacher gets for 'features'.
    lpips_path: weights of LPIPS, as eval.lpips_path.
    lpips_pooling: in its network; released is 'average', published 'max'.
  """

  metric: Literal["pseudo_huber", "l2", "l1", "features", "lpips"] = "features"
  huber_c: float | None = None
  feature_sigma: float = 0.05
  lpips_path: tuple[str, ...] = ()
  lpips_pooling: Literal["max", "average"] = "average"

  huber_normalize = True  # An option of consistency training.

  @staticmethod
  def distance_constraints(config) -> str | None:
    """Returns what the distance lacks, or None."""
    if config.method.metric == "lpips" and not config.method.lpips_path:
      return (
          "method.metric='lpips' needs weights: set method.lpips_path as "
          "docs/evaluation.md says, or method.metric='features'"
      )
    return None

  def distance(self, a, b, ctx: base.Context) -> jax.Array:
    """Returns d [B] of images [B, H, W, C] in [-1, 1]."""
    if self.metric == "lpips":
      a, b = map(lpips.enlarge, (a, b))
      return lpips.distance(ctx.frozen["lpips"], a, b, self.lpips_pooling)
    if self.metric == "features":
      sigma = jnp.full(a.shape[:1], self.feature_sigma, a.dtype)
      params = ctx.frozen["teacher"]
      return distances.of_features(*(
          self.teacher.features(params, v, sigma, ctx.labels) for v in (a, b)
      ))
    return distances.by_name(
        self.metric, a, b, self.huber_c, self.huber_normalize
    )


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(ImageDistance, consistency.ConsistencyTraining):
  """The loss above; its other options are consistency training's.

  Attributes:
    teacher: the frozen denoiser that the network starts from.
    solver: of the teacher's step, 'heun' or 'euler'.
  """

  teacher: edm.Diffusion | None = base.frozen_field()
  solver: Literal["heun", "euler"] = "heun"

  title = "consistency model, distilled from a denoiser,"
  paper = "Song et al., 2023"
  frozen = {"teacher": TEACHER, "lpips": LPIPS}

  @classmethod
  def constraints(cls, config):
    """Returns what is wrong with the distance or the curriculum, or None."""
    return cls.distance_constraints(config) or super().constraints(config)

  @property
  def networks(self):
    """The student, which starts from the teacher."""
    network = super().networks["student"]
    return {"student": dataclasses.replace(network, init_from="teacher")}

  def x_r(self, ctx: base.Context, z, times) -> jax.Array:
    """Returns one step of the teacher's solver from x_t (eq. 6)."""
    x_t = process.add_noise(ctx.images, times.t, z)
    t, r = (process.expand(s, x_t.ndim) for s in (times.t, times.r))
    denoiser = self.teacher.solver_denoiser(ctx.frozen["teacher"], ctx.labels)
    step = {"heun": solvers.heun_step, "euler": solvers.euler_step}
    return jax.lax.stop_gradient(step[self.solver](denoiser, x_t, t, r))
