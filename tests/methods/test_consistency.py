"""Consistency losses in closed form: CT, iCT and ECT as one loss's options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bcm_jax.config import registry
from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.methods import consistency
from bcm_jax.models import layers
from bcm_jax.training import rng
from tests import toys

IMAGES = toys.images()
B = len(IMAGES)
END = 0.002


def preset(name, network=None, **options):
  options = registry.METHODS[name].preset.options | options
  return toys.consistency_toy(network, **options)


def parameters(method):
  return toys.parameters(method, IMAGES)


def other(params, scale=0.1):
  """Parameters that differ from `params` everywhere."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  moved = [
      p + scale * jax.random.normal(k, p.shape, p.dtype)
      for p, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(tree, moved)


def by_hand(method, params, target, ctx, times):
  """The loss [B] from the formulas, with numpy's arithmetic."""
  t, r = (np.asarray(x, np.float64) for x in times[:2])
  z = process.normal_like(ctx.keys("noise"), ctx.images)
  end = jnp.full_like(times.t, END)
  outputs = []
  for p, level in ((params, times.t), (target, times.r)):
    x = ctx.images + level[:, None, None, None] * z
    outputs.append(method.f(p, x, level, end, None, ctx.keys("dropout")))
  b = np.where((r > 0)[:, None, None, None], outputs[1], ctx.images)
  squared = np.sum(np.square(outputs[0] - b), axis=(1, 2, 3))
  distance = {
      "ct": squared / 4,
      "ict": (np.hypot(np.sqrt(squared), 0.00108) - 0.00108) / 2,
      "ect": np.sqrt(squared),
  }
  weight = {"ct": 1, "ict": 1 / (t - r), "ect": 1 / (t - r)}
  return t, r, distance, weight


@pytest.mark.parametrize("name", ["ct", "ict", "ect"])
def test_presets_are_the_published_formulas(name):
  method = preset(name)
  params = parameters(method)
  target = other(params) if name == "ct" else params
  averages = {"target": target} if name == "ct" else {}
  ctx = toys.context(IMAGES, method.curriculum(0), averages=averages)
  loss, metrics = jax.jit(lambda p: method.loss(p, ctx))(params)
  times = method.sample_times(ctx)
  _, _, distance, weight = by_hand(method, params, target, ctx, times)
  assert loss.shape == (B,)
  np.testing.assert_array_equal(loss, metrics["loss_ct"])
  np.testing.assert_allclose(
      loss, weight[name] * distance[name], rtol=1e-3, atol=1e-6
  )


def test_the_target_lags_only_where_it_is_said_to():
  assert set(preset("ct").averages) == {"target"}
  assert not preset("ict").averages and not preset("ect").averages


@pytest.mark.parametrize(
    "weighting,expected",
    [
        ("inverse_gap", 1 / 1.5),
        ("uniform", 1.0),
        ("karras", 1 / 4 + 4),
        ("snr+1", 1 / 4 + 1),
        ("edm", (4 + 0.25) / 1),
    ],
)
def test_weightings(weighting, expected):
  method = toys.consistency_toy(weighting=weighting)
  t, r = jnp.array([2.0]), jnp.array([0.5])
  np.testing.assert_allclose(method.weight(t, r), expected, rtol=1e-6)


def test_distances_by_name():
  a, b = jnp.array([[[3.0, 0.0]]]), jnp.array([[[0.0, -4.0]]])
  options = {
      ("l2", None): 12.5, ("l1", None): 3.5,
      ("pseudo_huber", 12.0): 1 / np.sqrt(2),
      ("pseudo_huber", None): 5 / np.sqrt(2) - 0.00054,
  }
  for (metric, c), expected in options.items():
    method = toys.consistency_toy(metric=metric, huber_c=c)
    np.testing.assert_allclose(method.distance(a, b, None), expected, rtol=1e-6)


# Times.


def test_ect_draws_continuous_log_normal_times():
  images = np.zeros((20_000, 1, 1, 1), np.float32)
  method = preset("ect", p_mean=-0.8, p_std=1.6)
  times = method.sample_times(toys.context(images, method.curriculum(0)))
  log_t = np.log(np.float64(times.t))
  assert stats.kstest(log_t, stats.norm(-0.8, 1.6).cdf).pvalue > 1e-3
  assert len(np.unique(times.t)) > 19_000


@pytest.mark.parametrize("step,stage", [(0, 0), (99, 0), (100, 1), (730, 7)])
def test_ect_gap_shrinks_by_stages(step, stage):
  method = preset("ect", ect_stage_steps=100)
  ctx = toys.context(IMAGES, method.curriculum(step))
  t, r, index = method.sample_times(ctx)
  t = np.float64(t)
  gap = 2.0 ** -(stage + 1) * (1 + 8 / (1 + np.exp(t)))
  np.testing.assert_allclose(
      r, np.maximum(t * (1 - gap), 0), rtol=1e-4, atol=1e-6
  )
  assert index is None and np.all(r < t)


def test_ect_target_at_level_nought_is_the_image():
  method = preset("ect")
  # The first stage's gap exceeds t wherever t is small.
  t = jnp.linspace(0.01, 0.5, B)
  cls = toys.at_times(consistency.ConsistencyTraining, t, jnp.zeros_like(t))
  method = cls(**{
      f.name: getattr(method, f.name) for f in dataclasses.fields(method)
  })
  params = parameters(method)
  ctx = toys.context(IMAGES)
  z = process.normal_like(ctx.keys("noise"), IMAGES)
  b = method.target(params, ctx, z, method.sample_times(ctx), None)
  np.testing.assert_array_equal(b, IMAGES)
  value, grad = jax.value_and_grad(lambda p: method.loss(p, ctx)[0].sum())(
      params
  )
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("bins", ["lognormal", "uniform"])
def test_grid_times_follow_the_law_of_the_intervals(bins):
  images = np.zeros((20_000, 1, 1, 1), np.float32)
  method = toys.consistency_toy(time_distribution=bins)  # N = 11 at first.
  times = method.sample_times(toys.context(images, method.curriculum(0)))
  # The grid and the law, written anew.
  edges = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 11) ** 7
  mass = np.diff(stats.norm(-1.1, 2).cdf(np.log(edges)))
  mass = mass / mass.sum() if bins == "lognormal" else np.full(10, 0.1)
  counts = np.bincount(np.asarray(times.index), minlength=11)
  assert counts[0] == 0
  assert stats.chisquare(counts[1:], 20_000 * mass).pvalue > 1e-3
  np.testing.assert_allclose(times.t, edges[times.index], rtol=1e-5)
  np.testing.assert_allclose(times.r, edges[times.index - 1], rtol=1e-5)


@pytest.mark.parametrize("name", ["ct", "ict", "ect"])
def test_no_stage_of_a_curriculum_recompiles(name):
  method = preset(name, ect_stage_steps=5, s1=40)
  params = parameters(method)
  traces = []

  @jax.jit
  def loss(curriculum):
    traces.append(1)
    return method.loss(params, toys.context(
        IMAGES, curriculum, averages={"target": params}
    ))[0]

  seen = set()
  for step in range(36):
    curriculum = method.curriculum(step)
    assert np.isfinite(loss(curriculum)).all()
    seen.add(float(curriculum.get("num_scales", curriculum.get("gap_ratio"))))
  assert len(seen) >= 3  # The curriculum did move.
  assert len(traces) == 1


# What passes share, and where gradients stop.


class Mask(layers.nn.Module):
  """F is its dropout mask; nothing else."""

  two_time: bool = False

  @layers.nn.compact
  def __call__(
      self, x, c_noise, c_noise_end=None, labels=None, dropout_keys=None
  ):
    return layers.Dropout(0.5)(jnp.ones_like(x), dropout_keys)


def test_both_passes_share_the_dropout_mask():
  t, r = jnp.full(B, 3.0), jnp.full(B, 1.0)
  cls = toys.at_times(consistency.ConsistencyTraining, t, r)
  method = cls(
      Mask(), preconditioning="edm", metric="l2", weighting="uniform"
  )
  ctx = toys.context(IMAGES)
  loss, _ = method.loss({}, ctx)
  keys = ctx.keys("dropout")
  mask = method.network.apply({}, IMAGES, t, None, None, keys)
  assert set(np.unique(mask)) == {0, 2}
  z = process.normal_like(ctx.keys("noise"), IMAGES)
  expected = 0
  for sign, level in ((1, 3.0), (-1, 1.0)):
    a = level**2 + 0.25
    expected += sign * (
        0.25 / a * (IMAGES + level * z) + 0.5 * level / np.sqrt(a) * mask
    )
  np.testing.assert_allclose(
      loss, np.mean(expected**2, axis=(1, 2, 3)), rtol=1e-5
  )


def test_equal_levels_cost_nothing_under_a_shared_mask():
  t = jnp.linspace(0.1, 5, B)
  cls = toys.at_times(consistency.ConsistencyTraining, t, t)
  method = cls(
      toys.MLP(two_time=False, dropout=0.5), preconditioning.adm_c_noise,
      "edm",
  )
  params = parameters(method)
  ctx = toys.context(IMAGES)
  np.testing.assert_array_equal(method.loss(params, ctx)[0], 0)

  # Were each pass to have keys of its own, the loss would not vanish.
  z = process.normal_like(ctx.keys("noise"), IMAGES)
  times = method.sample_times(ctx)
  b = method.target(params, ctx, z, times, ctx.keys("another"))
  x_t = process.add_noise(IMAGES, t, z)
  a = method.f(params, x_t, t, t, None, ctx.keys("dropout"))
  assert np.all(method.distance(a, b, None) > 0)


def test_no_gradient_reaches_the_target():
  method = preset("ct")
  params = parameters(method)

  def total(params, target):
    ctx = toys.context(
        IMAGES, method.curriculum(0), averages={"target": target}
    )
    return method.loss(params, ctx)[0].sum()

  online, target = jax.jit(jax.grad(total, argnums=(0, 1)))(
      params, other(params)
  )
  assert all(np.any(g != 0) for g in jax.tree.leaves(online))
  assert all(np.all(g == 0) for g in jax.tree.leaves(target))


def test_without_a_lagging_target_its_gradient_is_stopped_too():
  method = preset("ict")
  params = parameters(method)

  def total(params, averages):
    ctx = toys.context(IMAGES, method.curriculum(0), averages=averages)
    return method.loss(params, ctx)[0].sum()

  grad = jax.jit(jax.grad(total))
  # The target as separate, constant numbers: the same gradient.
  toys.assert_close(grad(params, {}), grad(params, {"target": params}))


@pytest.mark.parametrize("name", ["ict", "ect"])
def test_the_loss_follows_a_permutation_of_the_batch(name):
  method = preset(name, toys.MLP(two_time=False, dropout=0.3))
  params = parameters(method)

  @jax.jit
  def loss(images, index):
    ctx = toys.context(images, method.curriculum(0), index=index)
    return method.loss(params, ctx)[0]

  order = np.random.default_rng(3).permutation(B)
  straight = loss(IMAGES, np.arange(B))
  assert len(np.unique(straight)) == B
  np.testing.assert_allclose(
      loss(IMAGES[order], order), straight[order], rtol=1e-5
  )


def test_flow_map_is_deterministic_and_starts_at_the_boundary():
  method = preset("ict", toys.MLP(two_time=False, dropout=0.5))
  params = parameters(method)
  flow = method.flow_map(params)
  t = jnp.full(B, END)
  np.testing.assert_allclose(flow(IMAGES, t, t), IMAGES, rtol=1e-6)
  far = jnp.full(B, 5.0)
  np.testing.assert_array_equal(flow(IMAGES, far, t), flow(IMAGES, far, t))


def test_keys_depend_on_the_stream_and_step_alone():
  method = preset("ict")
  ctx = toys.context(IMAGES, method.curriculum(0), step=5)
  uniform = jax.vmap(jax.random.uniform)(
      rng.example_keys(0, "t", 5, np.arange(B))
  )
  edges = np.asarray(method.curriculum(0)["tables"].cdf)
  expected = np.searchsorted(edges, np.asarray(uniform), side="right")
  np.testing.assert_array_equal(method.sample_times(ctx).index, expected)
