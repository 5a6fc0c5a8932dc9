"""The soft trajectory constraint: exact maps, gradient stops, shared masks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.methods import bcm
from bcm_jax.models import layers
from tests import toys

BCM = bcm.BidirectionalTraining
IMAGES = toys.images()
B = len(IMAGES)
# Jumps up and down, from and to the ends, and one to r itself.
T = np.float32([80.0, 2.0, 0.5, 0.07, 10.0, 1.0, 0.02, 30.0])
R = np.float32([60.0, 1.5, 0.4, 0.05, 8.0, 0.5, 0.002, 20.0])
U = np.float32([0.002, 80.0, 2.0, 15.0, 0.3, 0.5, 0.05, 0.07])


def fixed(network, t=T, r=R, u=U, **options):
  """BCM with these draws of times."""
  return toys.at_times(BCM, t, r, u)(
      network, preconditioning.adm_c_noise, **options
  )


@functools.cache
def trained():
  """A method of random parameters, dropout on, and those parameters."""
  method = fixed(toys.MLP(dropout=0.5))
  return method, toys.parameters(method, IMAGES)


def terms(method, params, ctx):
  """L_CT and L_ST, [B] each."""
  loss, metrics = jax.jit(lambda params: method.loss(params, ctx))(params)
  np.testing.assert_allclose(
      loss, metrics["loss_ct"] + metrics["loss_st"], rtol=1e-6
  )
  return metrics["loss_ct"], metrics["loss_st"]


# The exact flow map of Gaussian data.


def test_the_stub_network_is_the_exact_flow():
  method = fixed(toys.GaussianFlow())
  out = method.f({"scale": 1.0}, IMAGES, T, U, None)
  t, u = (np.float64(v)[:, None, None, None] for v in (T, U))
  np.testing.assert_allclose(
      out, toys.exact_flow(IMAGES, t, u), rtol=2e-4, atol=1e-5
  )


def test_for_an_exact_map_both_terms_are_one_distance():
  # f(f(x_t, t, u), u, eps) = f(x_t, t, eps): only the weights differ.
  with jax.enable_x64(True):
    method = fixed(toys.GaussianFlow(), weighting="uniform")
    weighted = fixed(toys.GaussianFlow())
    ctx = toys.context(np.float64(IMAGES))
    params = {"scale": jnp.float64(1)}
    ct, soft = terms(method, params, ctx)
    # Not through zero: x_r is on the line from x_0, not on the flow's path.
    assert np.all(ct > 1e-5)
    np.testing.assert_allclose(soft, ct, rtol=1e-9)
    by_gap = terms(weighted, params, ctx)
    np.testing.assert_allclose(by_gap[0], ct / (T - R), rtol=1e-6)
    np.testing.assert_allclose(by_gap[1], soft / np.abs(T - U), rtol=1e-6)
    # A map that is no semigroup has another soft term.
    ct, soft = terms(method, {"scale": jnp.float64(0.9)}, ctx)
    assert np.max(np.abs(soft - ct)) > 1e-3


# Where gradients go.


class Line(nn.Module):
  """F = a x + b u x + c, of parameters to differentiate by hand."""

  two_time: bool = True

  @nn.compact
  def __call__(
      self, x, c_noise, c_noise_end, labels=None, dropout_keys=None
  ):
    a, b, c = (
        self.param(k, nn.initializers.constant(v), ())
        for k, v in (("a", 0.3), ("b", -0.2), ("c", 0.1))
    )
    u = c_noise_end.reshape(-1, 1, 1, 1) / 1000
    return a * x + b * u * x + c


TERMS = {"loss_ct": 0, "loss_st": 1}


@functools.cache
def line_terms():
  """Jitted (online, target, term's coefficients) -> sum of the terms."""
  method = fixed(Line())

  def total(params, target, coefficients):
    ctx = toys.context(np.float64(IMAGES), averages={"target": target})
    metrics = method.loss(params, ctx)[1]
    return sum(
        c * jnp.mean(metrics[k])
        for k, c in zip(TERMS, coefficients, strict=True)
    )

  return jax.jit(total), jax.jit(jax.grad(total, argnums=(0, 1)))


@pytest.mark.parametrize("term", TERMS)
def test_gradients_are_those_of_the_online_outputs_alone(term):
  params = {"a": 0.3, "b": -0.2, "c": 0.1}
  coefficients = tuple(float(k == term) for k in TERMS)
  with jax.enable_x64(True):
    value, gradient = line_terms()
    online, target = gradient(params, params, coefficients)
    assert target == {"a": 0, "b": 0, "c": 0}
    for name in params:
      # Only the online parameters move: target and outer jump stay.
      step = 1e-6
      moved = [
          value(params | {name: params[name] + s}, params, coefficients)
          for s in (step, -step)
      ]
      slope = (moved[0] - moved[1]) / (2 * step)
      assert abs(slope) > 1e-4  # Each matters, in either term.
      np.testing.assert_allclose(online[name], slope, rtol=1e-5)


@pytest.mark.slow
def test_online_network_as_target_is_stopped_alike():
  method = fixed(Line())
  params = {"a": 0.3, "b": -0.2, "c": 0.1}
  with jax.enable_x64(True):
    def total(params):
      return jnp.mean(method.loss(params, toys.context(np.float64(IMAGES)))[0])

    actual = jax.grad(total)(params)
    expected, _ = line_terms()[1](params, params, (1.0, 1.0))
  for name in params:
    np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9)


def test_the_soft_term_trains_the_jump_and_not_the_way_back():
  method, params = trained()
  ctx = toys.context(IMAGES)
  keys = ctx.keys("dropout")
  b = jnp.ones_like(IMAGES)

  def soft(params, y, b):
    return jnp.sum(method.soft_term(params, ctx, y, T, U, b, keys))

  back, jump = jax.jit(jax.grad(soft, argnums=(0, 1)))(params, IMAGES, b)
  assert all(np.all(g == 0) for g in jax.tree.leaves(back))
  assert np.all(np.any(jump != 0, axis=(1, 2, 3)))


def test_the_target_is_stopped_where_it_is_made():
  method, params = trained()
  ctx = toys.context(IMAGES)
  times = method.sample_times(ctx)

  def total(params, z):
    return jnp.sum(method.target(params, ctx, z, times, None))

  grad = jax.jit(jax.grad(total, argnums=(0, 1)))
  grads = grad(params, jnp.ones_like(IMAGES))
  assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


# One dropout mask.


class Mask(nn.Module):
  """F is its dropout mask; nothing else."""

  two_time: bool = True

  @nn.compact
  def __call__(self, x, c_noise, c_noise_end, labels=None, dropout_keys=None):
    return layers.Dropout(0.5)(jnp.ones_like(x), dropout_keys)


def test_all_four_passes_share_one_mask():
  method = fixed(Mask(), metric="l2", weighting="uniform")
  ctx = toys.context(IMAGES)
  ct, soft = terms(method, {}, ctx)
  mask = method.network.apply({}, IMAGES, T, U, None, ctx.keys("dropout"))
  assert set(np.unique(mask)) == {0, 2}

  def jump(x, t, u):
    t, u = (np.float64(v).reshape(-1, 1, 1, 1) for v in (t, u))
    a = t**2 + 0.25
    return (t * u + 0.25) / a * x + (t - u) * 0.5 / np.sqrt(a) * mask

  def at(t):
    z = process.normal_like(ctx.keys("noise"), IMAGES)
    return IMAGES + np.float64(t).reshape(-1, 1, 1, 1) * z

  end = np.full(B, 0.002)
  b = jump(at(R), R, end)
  for actual, out in (
      (ct, jump(at(T), T, end)),
      (soft, jump(jump(at(T), T, U), U, end)),
  ):
    expected = np.mean((out - b) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-7)


def test_equal_levels_cost_nothing_under_a_shared_mask():
  _, params = trained()
  method = fixed(toys.MLP(dropout=0.5), r=T)
  # Doubled, the online passes run at another batch size than the target's:
  # the same sums in another order.
  ct, soft = terms(method, params, toys.context(IMAGES))
  np.testing.assert_allclose(ct * 1e-20, 0, atol=1e-12)
  assert np.all(soft[1:] > 1e-9)  # The first jumps to sigma_min.
  ctx = toys.context(IMAGES)
  z = process.normal_like(ctx.keys("noise"), IMAGES)
  b = method.target(
      params, ctx, z, method.sample_times(ctx), ctx.keys("another")
  )
  a, _ = method.two_jump_outputs(
      params, process.add_noise(IMAGES, T, z), T, (jnp.full(B, 0.002), U),
      None, ctx.keys("dropout"),
  )
  assert np.all(method.distance(a, b, None) > 1e-4)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_two_jumps_are_two_calls(num_classes):
  method = fixed(toys.MLP(dropout=0.5, num_classes=num_classes))
  labels = None if num_classes is None else np.arange(B) % 3
  params = toys.parameters(method, IMAGES, labels)
  keys = toys.context(IMAGES).keys("dropout")
  ends = jnp.full(B, 0.002), U
  both = method.two_jump_outputs(params, IMAGES, T, ends, labels, keys)
  for out, end in zip(both, ends, strict=True):
    alone = method.f(params, IMAGES, T, end, labels, keys)
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-6)
    without = method.f(params, IMAGES, T, end, labels)
    assert np.max(np.abs(out - without)) > 1e-2
  unmasked = method.two_jump_outputs(params, IMAGES, T, ends, labels, None)
  np.testing.assert_allclose(
      unmasked[1], method.f(params, IMAGES, T, U, labels), rtol=1e-5,
      atol=1e-6,
  )


@pytest.mark.slow
def test_one_doubled_pass_is_two_passes_up_to_rounding():
  def gradients(doubled):
    method = toys.bidirectional_toy(
        toys.MLP(dropout=0.3), concat_jumps=doubled
    )
    params = toys.parameters(method, IMAGES)
    ctx = toys.context(IMAGES, method.curriculum(0))
    return jax.jit(jax.grad(lambda p: jnp.mean(method.loss(p, ctx)[0])))(
        params
    )

  toys.assert_close(gradients(False), gradients(True), rtol=1e-4)


# The loss as a whole.


def test_start_end_and_noise_use_streams_of_their_own():
  method = toys.bidirectional_toy()
  asked = []
  ctx = toys.context(IMAGES, method.curriculum(0))
  spy = ctx._replace(keys=lambda name: (asked.append(name), ctx.keys(name))[1])
  params = trained()[1]
  method.loss(params, spy)
  assert sorted(asked) == ["dropout", "noise", "t", "u"]


def test_no_stage_of_the_curriculum_recompiles():
  method = toys.bidirectional_toy()
  params = trained()[1]
  traces = []

  @jax.jit
  def loss(curriculum):
    traces.append(1)
    return method.loss(params, toys.context(IMAGES, curriculum))[0]

  seen = []
  for step in range(36):
    curriculum = method.curriculum(step)
    assert np.isfinite(loss(curriculum)).all()
    seen.append(int(curriculum["num_scales"]))
  assert sorted(set(seen)) == [11, 21, 41] and seen[0] == 11
  assert len(traces) == 1


def test_the_loss_follows_a_permutation_of_the_batch():
  method = toys.bidirectional_toy(toys.MLP(dropout=0.5, num_classes=3))
  labels = np.arange(B) % 3
  params = toys.parameters(method, IMAGES, labels)

  @jax.jit
  def loss(images, labels, index):
    ctx = toys.context(images, method.curriculum(0), labels, index=index)
    return method.loss(params, ctx)[1]

  order = np.random.default_rng(3).permutation(B)
  straight = loss(IMAGES, labels, np.arange(B))
  turned = loss(IMAGES[order], labels[order], order)
  for name, values in straight.items():
    assert len(np.unique(values)) == B
    np.testing.assert_allclose(turned[name], values[order], rtol=1e-4)


def test_weight_nought_is_plain_consistency_training():
  _, params = trained()
  ctx = toys.context(IMAGES, toys.bidirectional_toy().curriculum(0))
  off = toys.bidirectional_toy(bidirectional_weight=0.0)
  plain = toys.consistency_toy(
      toys.MLP(), preconditioning="bcm"
  )
  loss, metrics = off.loss(params, ctx)
  np.testing.assert_array_equal(loss, plain.loss(params, ctx)[0])
  assert set(metrics) == {"loss_ct"}
  half = toys.bidirectional_toy(bidirectional_weight=0.5)
  loss, metrics = half.loss(params, ctx)
  np.testing.assert_allclose(
      loss, metrics["loss_ct"] + 0.5 * metrics["loss_st"], rtol=1e-6
  )
