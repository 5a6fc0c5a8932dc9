"""Optimisers against their published formulas; schedules; clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.training import optim

B1, B2, EPS = 0.9, 0.999, 1e-8
SCALES = np.array([3.0, 0.5, 0.02])  # Of the quadratic's three directions.


def radam_step(step, lr, m, v):
  """An update of RAdam (Liu et al., 2020, algorithm 2), step from 1."""
  mean = m / (1 - B1**step)
  limit = 2 / (1 - B2) - 1
  length = limit - 2 * step * B2**step / (1 - B2**step)
  if length <= 5:  # The variance is intractable: momentum alone.
    return -lr * mean
  rectified = np.sqrt(
      (length - 4) * (length - 2) * limit
      / ((limit - 4) * (limit - 2) * length)
  )
  return -lr * rectified * mean / (np.sqrt(v / (1 - B2**step)) + EPS)


def adam_step(step, lr, m, v):
  """An update of Adam (Kingma & Ba, 2015, algorithm 1), step from 1."""
  return -lr * (m / (1 - B1**step)) / (np.sqrt(v / (1 - B2**step)) + EPS)


def reference(rule, steps, lr):
  """[steps, 3] trajectory on 0.5 sum SCALES w^2, in float64."""
  w, m, v = np.ones(3), np.zeros(3), np.zeros(3)
  path = []
  for step in range(1, steps + 1):
    g = SCALES * w
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    w = w + rule(step, lr, m, v)
    path.append(w)
  return np.array(path)


def trajectory(optimizer, steps):
  """[steps, 3] trajectory of ours on the same quadratic."""
  transform = optimizer.build()
  w = jnp.ones(3)

  def step(carry, _):
    w, state = carry
    updates, state = transform.update(SCALES * w, state, w)
    w = optax.apply_updates(w, updates)
    return (w, state), w

  carry = w, transform.init(w)
  return np.asarray(jax.lax.scan(step, carry, length=steps)[1])


@pytest.mark.parametrize(
    "name,rule", [("radam", radam_step), ("adam", adam_step)]
)
def test_the_published_recursion(name, rule):
  with jax.enable_x64(True):
    actual = trajectory(optim.Optimizer(name, learning_rate=0.01), 20)
  assert actual.dtype == np.float64
  np.testing.assert_allclose(
      actual, reference(rule, 20, 0.01), rtol=1e-6
  )


def test_radam_starts_as_momentum():
  # Its first five updates are not divided by a root mean square: they scale
  # with the gradient, and the sixth does not.
  path = np.concatenate([np.ones((1, 3)), reference(radam_step, 6, 1e-4)])
  moves = -np.diff(path, axis=0) / SCALES
  np.testing.assert_allclose(moves[:5], moves[:5, :1] * np.ones(3), rtol=1e-2)
  assert moves[5, 2] > 10 * moves[5, 0]
  actual = trajectory(optim.Optimizer("radam", learning_rate=1e-4), 6)
  np.testing.assert_allclose(actual, path[1:], rtol=1e-6)


def test_adamw_decays_weights_whatever_the_gradient():
  options = dict(learning_rate=0.1, weight_decay=0.5)
  transform = optim.Optimizer("adamw", **options).build()
  w = jnp.ones(3)
  updates, _ = transform.update(jnp.zeros(3), transform.init(w), w)
  np.testing.assert_allclose(updates, -0.05, rtol=1e-6)


BASE = optim.Optimizer(
    learning_rate=2.0, warmup_steps=10, schedule_steps=110,
    final_fraction=0.25,
)


@pytest.mark.parametrize(
    "schedule,points",
    [
        ("constant", {10: 2.0, 60: 2.0, 110: 2.0, 1000: 2.0}),
        ("cosine", {10: 2.0, 60: 1.25, 110: 0.5, 1000: 0.5}),
        ("linear", {10: 2.0, 60: 1.25, 110: 0.5, 1000: 0.5}),
        ("rsqrt", {10: 2.0, 60: 2.0, 110: 2.0, 440: 1.0}),
    ],
)
def test_schedules(schedule, points):
  rate = dataclasses.replace(BASE, schedule=schedule).rate()
  warm = {0: 0.0, 5: 1.0}
  for step, expected in (warm | points).items():
    np.testing.assert_allclose(rate(jnp.int32(step)), expected, rtol=1e-6)


def test_without_warm_up_the_first_rate_is_the_peak():
  options = dataclasses.replace(BASE, warmup_steps=0, schedule="linear")
  assert options.rate()(0) == 2.0


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_clipping_bounds_the_global_norm(size):
  clip = optim.Optimizer("radam", learning_rate=1.0, grad_clip=1.0)
  gradient = {"a": jnp.array([3.0, 0.0]) * size, "b": jnp.array(4.0) * size}
  transform = clip.build()
  # RAdam's first update is -rate times the clipped gradient.
  updates, _ = jax.jit(transform.update)(gradient, transform.init(gradient))
  shrink = min(1.0, 1 / (5 * size))
  np.testing.assert_allclose(updates["a"], [-3 * size * shrink, 0], rtol=1e-6)
  np.testing.assert_allclose(updates["b"], -4 * size * shrink, rtol=1e-6)


def test_rsqrt_is_the_learning_rate_of_edm2():
  """Golden numbers of the function are in test_phema."""
  edm2 = optim.Optimizer(
      learning_rate=0.01, schedule="rsqrt", warmup_steps=4882,
      schedule_steps=70_000,
  ).rate()
  for step in (0, 100, 4882, 70_000, 280_000):
    expected = 0.01 / max(step / 70_000, 1) ** 0.5 * min(step / 4882, 1)
    np.testing.assert_allclose(edm2(step), expected, rtol=1e-6)


@pytest.mark.parametrize("file, overrides", [
    ("digits_ctm.py:gan", {"method.gan_period": "3", "method.gan_start": "40"}),
    ("digits_dmd.py:dmd2", {}),
    ("digits_dmd.py:dmd2", {"method.fake_updates": "7"}),
    ("digits.py", {}),
])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_every_network_ends_its_schedule_at_the_last_step(
    file, overrides, schedule
):
  steps = 101
  config = resolve.resolve(resolve.read_file(file), overrides | {
      "optimizer.schedule": schedule,
      "optimizer.final_fraction": "0.25", "optimizer.warmup_steps": "0",
      "training.num_steps": str(steps), "training.init_from": "none",
  })
  experiment = build.build(config, to_train=False)
  method = experiment.method
  for name in method.networks:
    updates = sum(name in method.phase(step) for step in range(steps))
    section = experiment.optimizer_of(name)
    rate = section.rate()
    first, before, last = (
        float(rate(count) / section.learning_rate)
        for count in (0, updates - 1, updates)
    )
    assert first == pytest.approx(1)
    assert before > 0.25 and last == pytest.approx(0.25)
