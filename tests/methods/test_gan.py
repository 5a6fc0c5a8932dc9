"""Discriminators: their losses, their heads, and what they are shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.methods import gan
from bcm_jax.models import discriminator
from tests import toys

KEYS = jax.random.split(jax.random.key(0), 256)
FAKE = jnp.array([[-2.0, 0.5], [0.0, 3.0]])
REAL = jnp.array([[2.0, 0.5], [-1.0, 0.0]])


def test_losses_by_hand():
  np.testing.assert_allclose(
      gan.hinge_generator(FAKE), [0.75, -1.5]
  )
  np.testing.assert_allclose(
      gan.hinge_discriminator(FAKE, REAL),
      [(0 + 1.5) / 2 + (0 + 0.5) / 2, (1 + 4) / 2 + (2 + 1) / 2],
  )

  def log_sigmoid(x):
    return -np.log1p(np.exp(-np.asarray(x, np.float64)))

  np.testing.assert_allclose(
      gan.softplus_generator(FAKE), -log_sigmoid(FAKE).mean(-1),
      rtol=1e-6,
  )
  np.testing.assert_allclose(
      gan.softplus_discriminator(FAKE, REAL),
      -log_sigmoid(-FAKE).mean(-1) - log_sigmoid(REAL).mean(-1), rtol=1e-6,
  )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(32, 16, 8), (8, 4), (3,), (1,)])
def test_a_head_takes_any_size(sizes):
  features = [jnp.ones((2, s, s, 8)) * jnp.array([1.0, 2.0])[:, None, None,
                                                           None]
              for s in sizes]
  features = [
      f + jax.random.normal(jax.random.key(i), f.shape)
      for i, f in enumerate(features)
  ]
  heads = discriminator.Heads()
  params = jax.jit(heads.init)(jax.random.key(0), features)
  apply = jax.jit(heads.apply)
  logits = apply(params, features)
  assert logits.shape == (2, len(sizes))
  assert np.all(np.isfinite(logits))
  one = apply(params, [f[1:] for f in features])
  np.testing.assert_allclose(one[0], logits[1], rtol=1e-4, atol=1e-5)
  last = discriminator.Heads((-1,), 4)
  params = jax.jit(last.init)(jax.random.key(0), features)
  assert jax.jit(last.apply)(params, features).shape == (2, 1)


def test_a_head_of_dmd2_has_its_parameters():
  """18,879,745 on ImageNet-64's bottleneck of 768 channels at 8x8."""
  shapes = jax.eval_shape(
      lambda: discriminator.Head().init(
          jax.random.key(0), jnp.zeros((1, 8, 8, 768))
      )
  )
  count = sum(np.prod(s.shape) for s in jax.tree.leaves(shapes))
  assert count == 18_879_745


# DiffAugment ------------------------------------------------------------------


@pytest.mark.slow
def test_every_image_has_draws_of_its_own():
  x = jnp.asarray(toys.images(256, 16))
  out = gan.augment(x, KEYS)
  assert out.shape == x.shape
  again = gan.augment(x[3:5], KEYS[3:5])
  np.testing.assert_allclose(again, out[3:5], rtol=1e-5, atol=1e-6)
  same = gan.augment(jnp.broadcast_to(x[:1], x.shape), KEYS)
  assert len(np.unique(np.round(np.asarray(same).mean((1, 2, 3)), 5))) > 200


def test_colors():
  x = jnp.linspace(-1, 1, 16 * 16 * 3).reshape(1, 16, 16, 3)
  out = jax.vmap(gan._color, (None, 0))(x[0], KEYS)
  shift = np.asarray(out.mean((1, 2, 3)) - x.mean())
  assert abs(shift.mean()) < 0.05 and np.abs(shift).max() <= 0.5
  grey = np.asarray(out).mean(-1)
  contrast = np.std(grey, axis=(1, 2)) / np.std(np.asarray(x).mean(-1))
  assert 0.5 <= contrast.min() < 0.55 and 1.45 < contrast.max() <= 1.5
  # Saturation: differences of channels, over the contrast.
  colour = np.std(np.asarray(out) - grey[..., None], axis=(1, 2, 3)) / np.std(
      np.asarray(x) - np.asarray(x).mean(-1)[..., None]
  ) / contrast
  assert colour.min() < 0.1 and 1.9 < colour.max() <= 2


def test_shifts_and_holes():
  x = jnp.ones((16, 16, 1))
  moved = np.asarray(jax.vmap(gan._translate, (None, 0))(x, KEYS))
  left = 16 - (moved[:, :, :, 0].max(1) > 0).sum(-1)
  assert left.min() == 0 and left.max() == 2
  assert set(np.unique(moved)) == {0.0, 1.0}
  cut = np.asarray(jax.vmap(gan._cutout, (None, 0))(x, KEYS))
  holes = (cut == 0).sum((1, 2, 3))
  assert holes.max() == 9 and holes.min() >= 1  # 3x3; edges cut it.
  # Anywhere: every pixel is cut out at times.
  assert np.all((cut == 0).any(0))


def test_it_is_differentiable():
  x = jnp.asarray(toys.images(4, 8))
  grad = jax.grad(lambda x: jnp.sum(gan.augment(x, KEYS[:4]) ** 2))(x)
  assert np.all(np.isfinite(grad)) and np.mean(np.asarray(grad) != 0) > 0.5


def test_levels_stay_below_the_highest():
  teacher, _ = toys.gaussian_teacher()
  judge = gan.Discriminator(teacher, discriminator.Heads(), sigma_max=1.0)
  sigma = np.asarray(judge.levels(KEYS))
  assert 0.002 <= sigma.min() and 0.9 < sigma.max() <= 1.0
