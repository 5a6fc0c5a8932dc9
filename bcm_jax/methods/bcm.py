"""Bidirectional consistency training (BCM; Li & He, 2024).

One network f(x, t, u) maps between any two noise levels. The loss is L_CT of
`consistency` plus the soft trajectory constraint

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
  """Loss L = L_CT + bidirectional_weight L_ST.

  Attributes:
    bidirectional_weight: coefficient of L_ST; 1 in the published method, 0
      omits it (negative control).
    concat_jumps: whether both jumps of an example use one forward pass of twice
      the batch size. Two passes give the same result up to rounding, and XLA
      compiles fewer shapes.
  """

  preconditioning: base.PreconditioningName = "bcm"
  bidirectional_weight: float = 1.0
  concat_jumps: bool = True

  title = "bidirectional consistency model"
  paper = "Li & He, 2024"
  supports_inversion = True

  @classmethod
  def constraints(cls, config):
    """Checks that network, grid and preconditioning have an end level."""
    options = config.method
    if not config.model.get("two_time"):
      return (
          "model.two_time: got False, expected a network with an end level for "
          f"method.name={options.name!r}; set model.two_time=True"
      )
    if options.time_distribution == "continuous":
      return (
          "method.time_distribution: got 'continuous', expected a grid of "
          f"levels for method.name={options.name!r}; use 'lognormal' or "
          "'uniform'"
      )
    if options.preconditioning not in ("bcm", "ctm"):
      return (
          f"method.preconditioning: got {options.preconditioning!r}, expected "
          f"one with an end level for method.name={options.name!r}; use 'bcm'"
      )
    return super().constraints(config)

  def load_pretrained(self, source, fresh):
    """Adds the second time branch to a consistency model's parameters.

    F is unchanged. Parameters that already have the branch are returned as is.
    """
    if self.network.ALIGN in source:
      return source
    return end_time.add_second_time(self.network, source, fresh)

  def sample_end(self, ctx: base.Context, index: jax.Array) -> jax.Array:
    """Draws end levels u != t, [B], from the grid.

    Args:
      ctx: keys and tables of the grid.
      index: [B] positions of t in the grid.
    """
    tables = ctx.curriculum["tables"]
    uniform = jax.vmap(jax.random.uniform)(ctx.keys("u"))
    other = schedules.sample_other_index(
        jnp.asarray(tables.end_cdf), index, uniform
    )
    return jnp.asarray(tables.sigmas)[other]

  def two_jump_outputs(
      self, params, x, t, ends, labels, dropout_keys, augment_labels=None
  ):
    """Returns f(x, t, u) at two end levels, with the same dropout mask.

    With concat_jumps each example is repeated next to itself, so that a sharded
    batch needs no communication.

    Args:
      params: parameters of the network.
      x: [B, H, W, C] at levels t.
      t: [B].
      ends: two arrays u [B].
      labels: [B] int32 or None.
      dropout_keys: [B].
      augment_labels: [B, 9] or None.

    Returns:
      Two arrays [B, H, W, C].
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
    """Returns L_ST [B] (eq. 10) of y = f(x_t, t, u).

    Gradients flow only through y. b is the target of L_CT.
    """
    end = jnp.full_like(t, self.sigma_min)
    frozen = jax.lax.stop_gradient(ctx.averages.get("target", params))
    v = self.f(
        frozen, y, u, end, ctx.labels, dropout_keys, ctx.augment_labels
    )
    return self.weight(t, u) * self.distance(v, b, ctx)

  def loss(self, params, ctx: base.Context):
    """Returns L_CT + bidirectional_weight L_ST [B], and metrics."""
    if self.bidirectional_weight == 0.0:
      return super().loss(params, ctx)
    times = self.sample_times(ctx)
    u = self.sample_end(ctx, times.index)
    z = process.normal_like(ctx.keys("noise"), ctx.images)
    x_t = process.add_noise(ctx.images, times.t, z)
    # The same keys for all four passes give one shared dropout mask.
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
