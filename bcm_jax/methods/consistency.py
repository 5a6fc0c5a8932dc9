"""Consistency training: CT, iCT and ECT as options of one loss.

  L_CT = w(t, r) d( f_theta(x_0 + t z, t), stopgrad f_target(x_0 + r z, r) )

CT: Song et al. (2023), eq. 10 and algorithm 3: adjacent levels r < t of a grid
that refines over training, the target network a moving average. iCT: Song &
Dhariwal (2023), sections 3.1 to 3.5 and table 1: w = 1 / (t - r), the target
network is the online one, pseudo-Huber distance, N doubles, log-normal t. ECT:
Geng et al. (2024): t is continuous and the gap t - r shrinks in stages.

Both passes share noise and dropout mask. Differences from released code: iCT's
mask is shared only where PyTorch's global generator was re-seeded, and ECT's
evaluation changes from EDM's preconditioning to that of CM with sigma_min =
0.003, which changes one-step images by at most 4e-5; here f is one function.
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
from bcm_jax.methods import base

CT = base.Preset(
    dict(
        discretization="sqrt", s0=2, s1=150, time_distribution="uniform",
        metric="l2", weighting="uniform", target_mu0=0.9,
    ),
    "consistency model", "Song et al., 2023",
)
ICT = base.Preset(
    dict(
        discretization="doubling", s0=10, s1=1280,
        time_distribution="lognormal", metric="pseudo_huber",
        weighting="inverse_gap", target_mu0=0.0,
    ),
    "consistency model, trained the improved way,", "Song & Dhariwal, 2023",
)
ECT = base.Preset(
    dict(
        time_distribution="continuous", metric="pseudo_huber", huber_c=0.0,
        huber_normalize=False, weighting="inverse_gap", target_mu0=0.0,
        preconditioning="edm",
    ),
    "consistency model, tuned the easy way,", "Geng et al., 2024",
)


class Times(NamedTuple):
  """Noise levels of a batch, [B] each.

  Attributes:
    t: start level.
    r: next lower level, start of the target.
    index: position of t in the grid; None for continuous t.
  """

  t: jax.Array
  r: jax.Array
  index: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(
    base.PreconditionedNetwork, base.SingleNetworkMethod
):
  """The loss L_CT of the module docstring; the defaults are those of iCT.

  Attributes:
    time_distribution: distribution of (t, r): 'lognormal' or 'uniform' over the
      intervals of the grid, or 'continuous' (ECT: ln t ~ N(p_mean, p_std^2)).
    p_mean: mean of ln t.
    p_std: standard deviation of ln t.
    include_T: whether to train at sigma_max, too; see schedules.grid_tables.
    discretization: discretization curriculum N(k).
    s0: initial number of intervals.
    s1: final number of intervals.
    curriculum_steps: K, length of the curriculum in steps.
    ect_q: q of ECT's r(t), see schedules.ect_gap_ratio.
    ect_stage_steps: steps per stage of ECT.
    ect_k: k of ECT's r(t), see schedules.ect_earlier_time.
    ect_b: b of ECT's r(t).
    metric: 'pseudo_huber', 'l2' or 'l1'.
    huber_c: c of the pseudo-Huber distance; None is 0.00054 sqrt(D) (iCT).
    huber_normalize: whether to divide the distance by sqrt(D), as in the code
      of BCM and iCT.
    weighting: 'inverse_gap' 1/(t - r), 'uniform' 1, 'snr' 1/t^2, 'snr+1'
      1/t^2 + 1, 'truncated-snr' max(1/t^2, 1), 'karras' 1/t^2 + 1/sd^2, or
      'edm' (t^2 + sd^2) / (t sd)^2, with sd = sigma_data.
    target_mu0: initial EMA rate of the target network (CT); 0 uses the online
      network, stop-gradiented.
  """

  time_distribution: Literal["lognormal", "uniform", "continuous"] = "lognormal"
  p_mean: float = -1.1
  p_std: float = 2.0
  include_T: bool = True  # noqa: N815 (the literature's T)
  discretization: Literal["doubling", "sqrt", "linear", "fixed"] = "doubling"
  s0: int = 10
  s1: int = 1280
  curriculum_steps: int = 400_000
  ect_q: float = 2.0
  ect_stage_steps: int = 25_000
  ect_k: float = 8.0
  ect_b: float = 1.0
  metric: Literal["pseudo_huber", "l2", "l1"] = "pseudo_huber"
  huber_c: float | None = None
  huber_normalize: bool = True
  weighting: Literal[
      "inverse_gap", "uniform", "snr", "snr+1", "truncated-snr", "karras", "edm"
  ] = "inverse_gap"
  target_mu0: float = 0.0

  @classmethod
  def constraints(cls, config):
    """Checks the number of intervals of the curriculum."""
    s0, s1 = config.method.s0, config.method.s1
    if not 1 <= s0 <= s1:
      return (
          f"method.s0: got {s0} with method.s1={s1}, expected 1 <= s0 <= s1; "
          "change one of them"
      )
    return None

  @property
  def averages(self) -> Mapping[str, base.Average]:
    """The target network, if target_mu0 > 0."""
    if self.target_mu0 == 0.0:
      return {}
    return {"target": base.Average("student", "target_ema_rate")}

  def num_scales(self, step: int) -> int:
    """Returns N(k), the number of intervals at a step."""
    step = min(step, self.curriculum_steps)
    return schedules.CURRICULA[self.discretization](
        step, self.curriculum_steps, self.s0, self.s1
    )

  def curriculum(self, step: int) -> dict[str, Any]:
    """Returns N, grid tables and the target's EMA rate; for ECT (t - r) / t."""
    if self.time_distribution == "continuous":
      ratio = schedules.ect_gap_ratio(step, self.ect_stage_steps, self.ect_q)
      return {"gap_ratio": jnp.float32(ratio)}
    n = self.num_scales(step)
    tables = schedules.grid_tables(
        n, self.s1 + 2, self.sigma_min, self.sigma_max, self.rho,
        self.time_distribution, self.p_mean, self.p_std, self.include_T,
    )
    rate = schedules.target_ema_rate(n, self.target_mu0, self.s0)
    return {
        "num_scales": jnp.float32(n),
        "tables": tables,
        "target_ema_rate": jnp.float32(rate),
    }

  def sample_times(self, ctx: base.Context) -> Times:
    """Draws levels r < t for every example."""
    if self.time_distribution == "continuous":
      z = jax.vmap(jax.random.normal)(ctx.keys("t"))
      t = jnp.exp(self.p_mean + self.p_std * z)
      r = schedules.ect_earlier_time(
          t, ctx.curriculum["gap_ratio"], self.ect_k, self.ect_b
      )
      return Times(t, r, None)
    tables = ctx.curriculum["tables"]
    uniform = jax.vmap(jax.random.uniform)(ctx.keys("t"))
    index = schedules.sample_index(jnp.asarray(tables.cdf), uniform)
    sigmas = jnp.asarray(tables.sigmas)
    return Times(sigmas[index], sigmas[index - 1], index)

  def distance(self, a, b, ctx: base.Context) -> jax.Array:
    """Returns d(a, b) [B] of images [B, H, W, C]."""
    del ctx  # Used by distances with frozen networks, see cd.
    return distances.by_name(
        self.metric, a, b, self.huber_c, self.huber_normalize
    )

  def weight(self, t, r) -> jax.Array:
    """Returns the weight w(t, r) [B] of levels t [B] and r [B]."""
    sd = self.sigma_data
    return {
        "inverse_gap": lambda: 1 / (jnp.abs(t - r) + 1e-20),
        "uniform": lambda: jnp.ones_like(t),
        "karras": lambda: 1 / t**2 + 1 / sd**2,
        "snr": lambda: 1 / t**2,
        "snr+1": lambda: 1 / t**2 + 1,
        "truncated-snr": lambda: jnp.maximum(1 / t**2, 1),
        "edm": lambda: preconditioning.edm_weight(t, sd),
    }[self.weighting]()

  def x_r(self, ctx: base.Context, z, times) -> jax.Array:
    """Returns x_r = x_0 + r z [B, H, W, C], with the noise z of x_t."""
    return process.add_noise(ctx.images, times.r, z)

  def target(self, params, ctx: base.Context, z, times, dropout_keys):
    """Returns the target b = f(x_r, r) [B, H, W, C], stop-gradiented."""
    frozen = jax.lax.stop_gradient(ctx.averages.get("target", params))
    end = jnp.full_like(times.r, self.sigma_min)
    x_r = self.x_r(ctx, z, times)
    b = self.f(
        frozen, x_r, times.r, end, ctx.labels, dropout_keys, ctx.augment_labels
    )
    if self.time_distribution == "continuous":
      # r may be 0 in ECT; the target is then the image.
      b = jnp.where(process.expand(times.r, b.ndim) > 0, b, ctx.images)
    return jax.lax.stop_gradient(b)

  def ct_term(self, a, b, times, ctx: base.Context) -> jax.Array:
    """Returns L_CT [B] of the online output a and the target b."""
    return self.weight(times.t, times.r) * self.distance(a, b, ctx)

  def loss(self, params, ctx: base.Context):
    """Returns L_CT [B], and metrics."""
    times = self.sample_times(ctx)
    z = process.normal_like(ctx.keys("noise"), ctx.images)
    x_t = process.add_noise(ctx.images, times.t, z)
    # The same keys for both passes give one dropout mask.
    keys = ctx.keys("dropout")
    end = jnp.full_like(times.t, self.sigma_min)
    a = self.f(
        params, x_t, times.t, end, ctx.labels, keys, ctx.augment_labels
    )
    b = self.target(params, ctx, z, times, keys)
    loss = self.ct_term(a, b, times, ctx)
    return loss, {"loss_ct": loss}
