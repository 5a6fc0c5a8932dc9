"""Consistency distillation (CD; Song et al., 2023) from a frozen denoiser.

  L_CD = w(t) d( f_theta(x_t, t), f_target(x_r, r) ),
  x_r = one step of the teacher's ODE solver from x_t = x_0 + t z down to r

for adjacent levels r < t of a fixed grid (eq. 6 and 7, algorithm 2). The
distance is LPIPS, as published, or a distance of the teacher's features, which
needs no network trained on ImageNet.
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

# Published CIFAR-10 settings except the distance: 18 levels, no target network.
CD = base.Preset(dict(
    discretization="fixed", s0=17, s1=17, time_distribution="uniform",
    metric="features", weighting="uniform", target_mu0=0.0,
))


# The teacher, a frozen denoiser.
TEACHER = base.FrozenRun(lambda options: f"method.name={options['name']!r}")


class _Lpips(NamedTuple):
  """The networks of LPIPS, loaded from files."""

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
  """Distance d(a, b) of images, for methods with a field `teacher`.

  Attributes:
    metric: 'pseudo_huber', 'l2', 'l1', 'features' of the teacher, or 'lpips'.
    huber_c: c of the pseudo-Huber distance; None is 0.00054 sqrt(D) (iCT).
    feature_sigma: noise level input of the teacher for 'features'.
    lpips_path: weight files of LPIPS, as eval.lpips_path.
    lpips_pooling: pooling of the LPIPS network: 'average' in the released code,
      'max' in the published network.
  """

  metric: Literal["pseudo_huber", "l2", "l1", "features", "lpips"] = "features"
  huber_c: float | None = None
  feature_sigma: float = 0.05
  lpips_path: tuple[str, ...] = ()
  lpips_pooling: Literal["max", "average"] = "average"

  huber_normalize = True  # An option of consistency training.

  @staticmethod
  def distance_constraints(config) -> str | None:
    """Checks that weights of LPIPS are set; returns an error text or None."""
    if config.method.metric == "lpips" and not config.method.lpips_path:
      return (
          "method.lpips_path: got (), expected weight files for "
          "method.metric='lpips'; see docs/evaluation.md, or set "
          "method.metric='features'"
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
          self.teacher.features(
              params, v, sigma, ctx.labels, ctx.augment_labels
          )
          for v in (a, b)
      ))
    return distances.by_name(
        self.metric, a, b, self.huber_c, self.huber_normalize
    )


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(ImageDistance, consistency.ConsistencyTraining):
  """The loss L_CD of the module docstring.

  Attributes:
    teacher: frozen denoiser, which also initializes the network.
    solver: ODE solver of the teacher's step, 'heun' or 'euler'.
  """

  teacher: edm.Diffusion | None = base.frozen_field()
  solver: Literal["heun", "euler"] = "heun"

  title = "consistency model, distilled from a denoiser,"
  paper = "Song et al., 2023"
  frozen = {"teacher": TEACHER, "lpips": LPIPS}

  @classmethod
  def constraints(cls, config):
    """Checks the distance and the curriculum."""
    return cls.distance_constraints(config) or super().constraints(config)

  @property
  def networks(self):
    """The student, initialized from the teacher."""
    network = super().networks["student"]
    return {"student": dataclasses.replace(network, init_from="teacher")}

  def x_r(self, ctx: base.Context, z, times) -> jax.Array:
    """Returns x_r [B, H, W, C], a solver step of the teacher from x_t (eq. 6).
    """
    x_t = process.add_noise(ctx.images, times.t, z)
    t, r = (process.expand(s, x_t.ndim) for s in (times.t, times.r))
    denoiser = self.teacher.solver_denoiser(
        ctx.frozen["teacher"], ctx.labels, ctx.augment_labels
    )
    step = {"heun": solvers.heun_step, "euler": solvers.euler_step}
    return jax.lax.stop_gradient(step[self.solver](denoiser, x_t, t, r))
