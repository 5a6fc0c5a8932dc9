"""The levels that CTM trains at (Kim et al., 2024, as released)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import schedules
from bcm_jax.methods import base


class Times(NamedTuple):
  """Levels s <= u < t of a batch, [B] each, and how they came about.

  Attributes:
    t, u, s: where the student starts, where the target does, where both end.
    index: t's place in the grid, 0 the noisiest.
    solver_steps: h, grid steps from t to u; a scalar, one for all examples.
  """

  t: jax.Array
  u: jax.Array
  s: jax.Array
  index: jax.Array
  solver_steps: jax.Array


class TrajectoryLevels:
  """Draws of `trajectory.TrajectoryDistillation`, by its numbers."""

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

  def sampled_levels(self, ctx: base.Context) -> dict[str, jax.Array]:
    """What mode inspect tells of the levels."""
    times = self.sample_times(ctx)
    return {
        "t, where the student starts": times.t,
        "u, where the teacher stops": times.u,
        "s, where both jump": times.s,
        "sigma of L_DSM": self.dsm_levels(ctx),
    }

  def dsm_levels(self, ctx: base.Context) -> jax.Array:
    """Levels of L_DSM: two laws, in turns along the global batch."""
    z = jax.vmap(jax.random.normal)(ctx.keys("dsm/normal"))
    v = self.dsm_high_share * jax.vmap(jax.random.uniform)(
        ctx.keys("dsm/uniform")
    )
    high, low = (s ** (1 / self.rho) for s in (self.sigma_max, self.sigma_min))
    return jnp.where(
        ctx.index % 2 == 0, jnp.exp(self.p_mean + self.p_std * z),
        (high + v * (low - high)) ** self.rho,
    )


def _uniform_index(uniform, low, high) -> jax.Array:
  """Integers low .. high [B] from draws in [0, 1)."""
  count = high - low + 1
  return low + jnp.minimum(jnp.floor(uniform * count), count - 1).astype(
      jnp.int32
  )
