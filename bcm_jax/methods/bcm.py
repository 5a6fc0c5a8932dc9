"""Bidirectional consistency training (BCM; Li & He, 2024).

One network f(x, t, u) for jumps between any two noise levels. To L_CT of
`consistency` it adds the soft trajectory constraint

  L_ST = d( f_stopgrad(theta)( f_theta(x_t, t, u), u, eps ), b ) / |t - u|

(eq. 10) with b the target of L_CT at the level r next below t, and u any other
level of the grid, above or below t. As in the released code, the target is b
and not f(x_t, t, eps), and all four passes share one dropout mask. Unlike it,
t and u may be sigma_max (include_T).
"""

import dataclasses

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.methods import base
from bcm_jax.methods import consistency
from bcm_jax.models import end_time


@dataclasses.dataclass(frozen=True)
class BidirectionalTraining(consistency.ConsistencyTraining):
  """L = L_CT + bidirectional_weight L_ST, all four passes under one mask.

  Attributes:
    bidirectional_weight: coefficient of L_ST; 1 in the published method, 0
      leaves it out (the negative control).
    concat_jumps: take both jumps of an example in one pass of twice the batch.
      Two passes give the same up to rounding; then all passes of a step have
      one batch size, and XLA has fewer shapes to compile.
  """

  preconditioning: base.PreconditioningName = "bcm"
  bidirectional_weight: float = 1.0
  concat_jumps: bool = True

  title = "bidirectional consistency model"
  paper = "Li & He, 2024"
  supports_inversion = True

  @classmethod
  def constraints(cls, config):
    """Returns why jumps to any level cannot be learned, or None."""
    options = config.method
    if not config.model.get("two_time"):
      return (
          f"method.name={options.name!r} needs a network with an end level; "
          "set model.two_time=True"
      )
    if options.time_distribution == "continuous":
      return (
          "method.time_distribution='continuous' has no grid to draw end "
          "levels from; use 'lognormal' or 'uniform' with "
          f"method.name={options.name!r}"
      )
    if options.preconditioning not in ("bcm", "ctm"):
      return (
          f"method.preconditioning={options.preconditioning!r} has no end "
          f"level; use 'bcm' with method.name={options.name!r}"
      )
    return super().constraints(config)

  def load_pretrained(self, source, fresh):
    """Starts from a consistency model's parameters, F unchanged.

    Parameters that have the second time branch already are taken as they are.
    """
    if self.network.ALIGN in source:
      return source
    return end_time.add_second_time(self.network, source, fresh)

  def sample_end(self, ctx: base.Context, index: jax.Array) -> jax.Array:
    """End levels u != t, [B], given t's index in the grid."""
    tables = ctx.curriculum["tables"]
    uniform = jax.vmap(jax.random.uniform)(ctx.keys("u"))
    other = schedules.sample_other_index(
        jnp.asarray(tables.end_cdf), index, uniform
    )
    return jnp.asarray(tables.sigmas)[other]

  def two_jump_outputs(
      self, params, x, t, ends, labels, dropout_keys, augment_labels=None
  ):
    """f(x, t, u) for both of two end levels, under one dropout mask.

    In a doubled batch each example is doubled in place, so that a batch cut
    over devices stays where it is, and takes its dropout key along.
    """
    if not self.concat_jumps:
      return tuple(
          self.f(params, x, t, u, labels, dropout_keys, augment_labels)
          for u in ends
      )

    def interleave(a, b):
      return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    def double(a):
      return None if a is None else interleave(a, a)

    out = self.f(
        params, double(x), double(t), interleave(*ends), double(labels),
        double(dropout_keys), double(augment_labels),
    )
    out = out.reshape(x.shape[0], 2, *x.shape[1:])
    return out[:, 0], out[:, 1]

  def soft_term(self, params, ctx: base.Context, y, t, u, b, dropout_keys):
    """L_ST [B] of y = f(x_t, t, u); its gradient flows through y alone."""
    end = jnp.full_like(t, self.sigma_min)
    frozen = jax.lax.stop_gradient(ctx.averages.get("target", params))
    v = self.f(
        frozen, y, u, end, ctx.labels, dropout_keys, ctx.augment_labels
    )
    return self.weight(t, u) * self.distance(v, b, ctx)

  def loss(self, params, ctx: base.Context):
    """L_CT + L_ST: per-example loss [B] and metrics."""
    if self.bidirectional_weight == 0.0:
      return super().loss(params, ctx)
    times = self.sample_times(ctx)
    u = self.sample_end(ctx, times.index)
    z = process.normal_like(ctx.keys("noise"), ctx.images)
    x_t = process.add_noise(ctx.images, times.t, z)
    # The same keys to each pass: one dropout mask shared by all four.
    keys = ctx.keys("dropout")
    end = jnp.full_like(times.t, self.sigma_min)
    a, y = self.two_jump_outputs(
        params, x_t, times.t, (end, u), ctx.labels, keys, ctx.augment_labels
    )
    b = self.target(params, ctx, z, times, keys)
    ct = self.ct_term(a, b, times, ctx)
    soft = self.soft_term(params, ctx, y, times.t, u, b, keys)
    return ct + self.bidirectional_weight * soft, {
        "loss_ct": ct,
        "loss_st": soft,
    }
