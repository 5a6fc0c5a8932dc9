"""Consistency distillation: the path that f follows is a teacher's.

  L_CD = w(t) d( f_theta(x_t, t), f_target(x_r, r) ),
  x_r = one step of the teacher's ODE solver from x_t = x_0 + t z down to r

for adjacent levels r < t of a fixed grid (Song et al., 2023, algorithm 2). The
distance may be LPIPS, or, where no ImageNet features are wanted or at hand, one
between the teacher's own features.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import distances
from bcm_jax.diffusion import process
from bcm_jax.diffusion import solvers
from bcm_jax.methods import base
from bcm_jax.methods import consistency
from bcm_jax.methods import edm
from bcm_jax.metrics import lpips

# Song et al.'s on CIFAR-10, but for the distance: 18 levels, a target network.
PRESET: Mapping[str, Any] = dict(
    discretization="fixed", s0=17, s1=17, time_distribution="uniform",
    metric="features", weighting="uniform", target_mu0=0.95,
)


def distance(
    method, a, b, ctx: base.Context, normalise: bool = True
) -> jax.Array:
  """Distance [B] between images [B, H, W, C] in [-1, 1], by a method's metric.

  Args:
    method: gives metric and huber_c, and for 'features' its teacher, which is
      told that the images are at level feature_sigma.
    a, b: images.
    ctx: holds the frozen networks, the teacher or LPIPS'.
    normalise: of the pseudo-Huber distance, see distances.
  """
  if method.metric == "lpips":
    a, b = map(lpips.enlarge, (a, b))
    return lpips.distance(ctx.frozen["lpips"], a, b, method.lpips_pooling)
  if method.metric == "features":
    sigma = jnp.full(a.shape[:1], method.feature_sigma, a.dtype)
    params = ctx.frozen["teacher"]
    return distances.of_features(*(
        method.teacher.features(params, v, sigma, ctx.labels) for v in (a, b)
    ))
  return distances.by_name(method.metric, a, b, method.huber_c, normalise)


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(consistency.ConsistencyTraining):
  """The loss above; its other options are consistency training's.

  Attributes:
    teacher: the frozen denoiser that the network starts from.
    solver: of the teacher's step, 'heun' or 'euler'.
    metric: besides consistency training's: 'features' of the teacher, 'lpips'.
    feature_sigma: level that the teacher is told for 'features'.
    lpips_path: weights of LPIPS, as eval.lpips_path.
    lpips_pooling: in its network; released is 'average', published 'max'.
  """

  teacher: edm.Diffusion = dataclasses.field(kw_only=True)
  solver: Literal["heun", "euler"] = "heun"
  metric: Literal["pseudo_huber", "l2", "l1", "features", "lpips"] = "features"
  feature_sigma: float = 0.05
  lpips_path: tuple[str, ...] = ()
  lpips_pooling: Literal["max", "average"] = "average"

  @property
  def networks(self) -> Mapping[str, base.TrainableNetwork]:
    """The student, which starts from the teacher."""
    network = super().networks["student"]
    return {"student": dataclasses.replace(network, init_from="teacher")}

  def x_r(self, ctx: base.Context, z, times):
    """x_r by one step of the teacher's solver from x_t."""
    x_t = process.add_noise(ctx.images, times.t, z)
    t, r = (process.expand(s, x_t.ndim) for s in (times.t, times.r))

    def denoiser(x, s):
      return self.teacher.denoise(
          ctx.frozen["teacher"], x, s.reshape(-1), ctx.labels
      )

    step = {"heun": solvers.heun_step, "euler": solvers.euler_step}
    return jax.lax.stop_gradient(step[self.solver](denoiser, x_t, t, r))

  def distance(self, a, b, ctx: base.Context):
    """d(a, b) for [B, ...] twice -> [B]."""
    return distance(self, a, b, ctx, self.huber_normalise)
