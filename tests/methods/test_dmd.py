"""DMD and DMD2: the KL gradient in closed form, and what reaches whom."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.methods import dmd
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import quick
from tests import toys

B = 20_000
IMAGES = toys.images(B)
ZERO = {"scale": jnp.zeros(())}


def make(preset=dmd.DMD2, cls=dmd.DistributionMatching, **options):
  teacher, _ = toys.gaussian_teacher()
  settings = dict(
      network=toys.GaussianDenoiser(), teacher=teacher, gan_features=4
  )
  return cls(**(settings | dict(preset.options) | options))


def context(images=IMAGES, student=ZERO, fake=ZERO, step=0, **more):
  return toys.context(
      images, networks={"student": student, "fake_score": {"network": fake}},
      frozen={"teacher": ZERO}, step=step, **more,
  )


# Levels -----------------------------------------------------------------------


def test_levels_are_those_of_the_released_grid():
  """1,000 levels, of which 20 to 980: 0.00323 to 72.05."""
  method = make()
  sigma = np.asarray(method.levels(context(), "x", dmd._LOW, dmd._HIGH))
  assert sigma.min() == pytest.approx(0.0032316, rel=0.02)
  assert sigma.max() == pytest.approx(72.0539, rel=0.01)
  ramp = (sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (
      80 ** (1 / 7) - 0.002 ** (1 / 7)
  )
  assert np.mean(ramp) == pytest.approx(0.5, abs=0.01)
  whole = np.asarray(method.levels(context(), "x", 0.0, 1.0))
  assert 0.002 <= whole.min() < 0.00201 and 79.9 < whole.max() <= 80.001


# The generator's gradient -----------------------------------------------------


def test_the_loss_has_the_gradient():
  method = make(gan_weight=0.0)
  ctx = context(IMAGES[:16], fake={"scale": jnp.float32(0.5)})
  labels = method.labels(ctx)
  params = {"scale": jnp.float32(0.3)}
  x = method.generate(params, ctx, labels)
  grad = method.gradient(ctx, x, labels)

  class Shifted(dmd.DistributionMatching):
    """Images x + shift, so that the loss can be derived by them."""

    def generate(self, params, ctx, labels):
      return x + params

  moved = make(gan_weight=0.0, cls=Shifted)
  derived = jax.grad(
      lambda shift: jnp.mean(moved.student_loss(shift, ctx)[0])
  )(jnp.zeros_like(x))
  np.testing.assert_allclose(derived, grad / x.size, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mean, spread", [(0.4, 0.5), (0.0, 0.9)])
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_it_is_the_gradient_of_the_divergence(mean, spread, sigma):
  """Generator m + s z, data N(0, v), both denoisers exact.

  d KL / dm = (m - 0) / (v + sigma^2), d KL / ds = s (1 / (v + sigma^2) -
  1 / (s^2 + sigma^2)); ours is that times sigma^2 and the spread of noise.
  """
  v = toys.SIGMA_DATA**2

  def of_generated(params, x, s, labels, augment_labels=None):
    ratio = (spread**2 / (spread**2 + s**2))[:, None, None, None]
    return mean + ratio * (x - mean)

  class Exact(dmd.DistributionMatching):
    """Denoisers of both distributions, at one level."""

    def levels(self, ctx, stream, low, high):
      return jnp.full(len(ctx.images), sigma)

    @property
    def denoiser(self):
      return types.SimpleNamespace(denoise=of_generated)

  method = make(cls=Exact, dm_weight="none")
  ctx = context()
  z = jax.random.normal(jax.random.key(0), IMAGES.shape)
  x = mean + spread * z
  grad = method.gradient(ctx, x, None) / sigma**2
  assert np.mean(grad) == pytest.approx(mean / (v + sigma**2), abs=0.03)
  expected = spread * (1 / (v + sigma**2) - 1 / (spread**2 + sigma**2))
  assert np.mean(grad * z) == pytest.approx(expected, abs=0.05)
  # The usual weight only scales each image's.
  normalised = dataclasses.replace(method, dm_weight="normalized").gradient(
      ctx, x, None
  )
  cosine = np.sum(grad * normalised, axis=(1, 2, 3)) / np.sqrt(
      np.sum(grad**2, axis=(1, 2, 3)) * np.sum(normalised**2, axis=(1, 2, 3))
  )
  assert np.min(cosine) > 0.999


def test_equal_denoisers_leave_the_generator_alone():
  method = make(gan_weight=0.0)
  ctx = context(IMAGES[:16])
  params = {"scale": jnp.float32(0.7)}
  loss, parts = method.student_loss(params, ctx)
  assert np.all(np.asarray(loss) == 0) and np.all(parts["loss_dm"] == 0)
  grad = jax.grad(lambda p: jnp.sum(method.student_loss(p, ctx)[0]))(params)
  assert grad["scale"] == 0


def test_a_vanishing_denominator_is_no_nan():
  """The generator makes just what the teacher sees in its noised image."""
  method = make(gan_weight=0.0)
  ctx = context(np.zeros((4, 2, 2, 1), np.float32),
                fake={"scale": jnp.float32(0.5)})

  class Perfect(dmd.DistributionMatching):
    def levels(self, ctx, stream, low, high):
      return jnp.full(len(ctx.images), 1e-12)

  method = make(cls=Perfect, gan_weight=0.0)
  grad = method.gradient(ctx, jnp.zeros((4, 2, 2, 1)), None)
  assert np.all(np.isfinite(grad))


# The generator in several steps -----------------------------------------------


def test_one_step_is_the_denoiser_at_sigma_max():
  method = make()
  ctx = context(IMAGES[:8])
  x = method.generate(ZERO, ctx, None)
  # sd^2 / (sd^2 + 80^2) of noise of spread 80.
  assert np.std(x) == pytest.approx(80 * 0.25 / (0.25 + 6400), rel=0.5)
  np.testing.assert_allclose(
      x, method.generate(ZERO, context(np.ones_like(IMAGES[:8])), None)
  )


@pytest.mark.slow
def test_inputs_of_later_steps_are_made_by_the_generator():
  method = make(steps=4)
  assert method.start_levels[0] == 80 and len(method.start_levels) == 4
  assert np.all(np.diff(method.start_levels) < 0)
  spreads = {}
  for step in range(40):
    ctx = context(IMAGES[:256], step=step)
    m = int(jax.random.randint(ctx.shared_key("generator/step"), (), 0, 4))
    x = method.generate(ZERO, ctx, None)
    # Real images play no part.
    np.testing.assert_array_equal(
        x, method.generate(ZERO, context(0 * IMAGES[:256], step=step), None)
    )
    spreads[m] = float(np.std(x))
    if len(spreads) == 4:
      break
  assert sorted(spreads) == [0, 1, 2, 3]
  # The exact denoiser comes nearer to the data's spread with every step.
  assert np.all(np.diff([spreads[m] for m in range(4)]) > 0)


def test_earlier_steps_pass_no_gradient():
  method = make(steps=2)
  for step in range(20):
    ctx = context(IMAGES[:4], step=step)
    if int(jax.random.randint(ctx.shared_key("generator/step"), (), 0, 2)):
      break

  def last_step(scale, before):
    x = method.denoiser.denoise(
        {"scale": before}, 80 * _noise(ctx, 0), jnp.full(4, 80.0), None
    )
    level = method.start_levels[1]
    return method.denoiser.denoise(
        {"scale": scale}, x + level * _noise(ctx, 1), jnp.full(4, level), None
    )

  whole = jax.jacrev(
      lambda s: method.generate({"scale": s}, ctx, None)
  )(jnp.float32(0.5))
  last = jax.jacrev(last_step)(jnp.float32(0.5), jnp.float32(0.5))
  np.testing.assert_allclose(whole, last, rtol=1e-4, atol=1e-6)


def _noise(ctx, k):
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
      ctx.keys("generator/noise"), k
  )
  return jax.vmap(lambda k: jax.random.normal(k, (2, 2, 1)))(keys)


# mu_fake ----------------------------------------------------------------------


def test_the_fake_denoiser_learns_what_the_generator_makes():
  """Its optimum for images of spread a is another than the data's."""
  class Wide(dmd.DistributionMatching):
    def generate(self, params, ctx, labels):
      return 2.0 * ctx.images

  method = make(cls=Wide, gan_weight=0.0)
  ctx = context()

  def mean(scale):
    return jnp.mean(
        method.fake_loss({"network": {"scale": scale}}, ctx)[0]
    )

  assert jax.grad(mean)(jnp.float32(0.0)) < -0.1
  same = make(cls=type("Same", (dmd.DistributionMatching,), {
      "generate": lambda self, params, ctx, labels: ctx.images
  }), gan_weight=0.0)
  flat = jax.grad(lambda s: jnp.mean(
      same.fake_loss({"network": {"scale": s}}, ctx)[0]
  ))(jnp.float32(0.0))
  assert abs(flat) < 0.05


def test_the_fake_loss_gives_the_generator_nothing():
  method = make(gan_weight=0.0)

  def mean(scale):
    ctx = context(IMAGES[:16], student={"scale": scale})
    return jnp.mean(method.fake_loss({"network": ZERO}, ctx)[0])

  # The engine stops it as well; here the loss itself must.
  assert jax.grad(mean)(jnp.float32(0.4)) == 0


# Networks ---------------------------------------------------------------------


def begin(method, images):
  optimizers = {name: optax.adam(1e-2) for name in method.networks}
  start = {"student": ZERO, "fake_score": ZERO}
  state = quick.jit(lambda: train_state.create(
      method, optimizers, (), 0, images, None, start
  ))().replace(frozen={"teacher": ZERO})
  step = train_step.make_step(
      method, optimizers, train_step.StepOptions(ema_rates=())
  )
  return state, jax.jit(step, static_argnames="phase")


@pytest.mark.slow
def test_five_updates_of_the_fake_to_one_of_the_generator():
  images = toys.images(8, 4)
  method = make()
  state, step = begin(method, images)
  for k in range(11):
    batch = {"image": images, "index": np.arange(8)}
    new, metrics = step(state, batch, {}, method.phase(k))
    toys.assert_equal(new.frozen, state.frozen)
    if k % 5:
      toys.assert_equal(new.networks["student"], state.networks["student"])
      assert "student/loss" not in metrics
    state = new
  updates = {k: int(p.num_updates) for k, p in state.networks.items()}
  assert updates == {"student": 3, "fake_score": 11}
  assert step._cache_size() == len(method.phases()) == 2


@pytest.mark.slow
def test_who_learns_from_the_discriminator():
  """The generator through the head; the head and the encoder by telling."""
  images = toys.images(8, 4)
  method = make()
  state, _ = begin(method, images)
  fake = state.networks["fake_score"].params
  assert set(fake) == {"network", "head"}
  ctx = toys.context(
    images,
    networks={"student": {"scale": jnp.float32(0.3)}, "fake_score": fake},
    frozen={"teacher": ZERO},
  )
  grads = quick.jit(jax.grad(
    lambda p: jnp.mean(method.fake_loss(p, ctx)[1]["loss_gan"])
  ))(fake)
  assert optax.global_norm(grads["head"]) > 0
  # This toy's features come before its only parameter: no encoder to train.
  assert grads["network"]["scale"] == 0
  student = quick.jit(jax.grad(
    lambda p: jnp.mean(method.student_loss(p, ctx)[1]["loss_gan"])
  ))({"scale": jnp.float32(0.3)})
  assert student["scale"] != 0


def test_regression_is_on_pairs():
  method = make(dmd.DMD, metric="l2")
  assert set(
    method.networks["fake_score"].init(jax.random.key(0), IMAGES[:1], None)
  ) == {"network"}
  noise = jax.random.normal(jax.random.key(1), (8, 2, 2, 1))
  made = method.denoiser.denoise(
    {"scale": jnp.float32(0.4)}, 80 * noise, jnp.full(8, 80.0), None
  )
  ctx = context(
    np.asarray(made), extra={"noise": np.asarray(noise, np.float16)}
  )
  right, wrong = (
    method.student_loss({"scale": jnp.float32(s)}, ctx)[1]["loss_regression"]
    for s in (0.4, 0.6)
  )
  assert np.max(right) < 1e-5 and np.min(wrong) > 100 * np.max(right)
  assert method.phases() == (("student", "fake_score"),)


def test_classes_are_drawn_apart_from_the_data():
  network = toys.GaussianDenoiser(num_classes=10)
  method = make(network=network)
  labels = method.labels(context(labels=jnp.zeros(B, jnp.int32)))
  counts = np.bincount(np.asarray(labels), minlength=10)
  assert len(counts) == 10 and np.all(np.abs(counts / B - 0.1) < 0.01)
  assert method.labels(context()) is None
