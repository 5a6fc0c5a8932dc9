"""What is known of an image, and its algebra: projections."""

import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.sampling import zero_shot
from tests import toys


def images(n=2, size=8, channels=3):
  rng = np.random.default_rng(0)
  return jnp.asarray(
      rng.uniform(-1, 1, (n, 3, size, size, channels)), jnp.float32
  )


def holes(size=8):
  mask = np.ones((3, size, size, 1), np.float32)
  mask[:, 2:6, 2:6] = 0
  return jnp.asarray(mask)


KEEP = {
    "pixels": lambda x, known: zero_shot.keep_pixels(x, known, holes()),
    "grey": zero_shot.keep_gray,
    "means": lambda x, known: zero_shot.keep_means(x, known, 2),
}
KNOWN = {
    "pixels": lambda x: x * holes(),
    "grey": lambda x: zero_shot.to_gray(x),
    "means": lambda x: zero_shot.shrink(x, 2),
}


@pytest.mark.parametrize("name", KEEP)
def test_replacing_an_image_by_itself_changes_no_bit(name):
  x, _ = images()
  np.testing.assert_array_equal(KEEP[name](x, x), x)


@pytest.mark.parametrize("name", KEEP)
def test_the_known_part_is_kept_and_keeping_twice_is_once(name):
  x, known = images()
  out = KEEP[name](x, known)
  toys.assert_close(KNOWN[name](out), KNOWN[name](known), toys.rounding(8))
  toys.assert_close(KEEP[name](out, known), out, toys.rounding(8))


@pytest.mark.parametrize("name", KEEP)
def test_nothing_else_is_changed(name):
  """The change is orthogonal to whatever has no known part."""
  x, known = images()
  change = KEEP[name](x, known) - x
  unseen = known - KEEP[name](jnp.zeros_like(x), known)
  inner = jnp.sum(change * unseen, axis=(1, 2, 3))
  norms = jnp.linalg.norm(change.reshape(3, -1), axis=1)
  assert (norms > 1).all()
  scale = norms * jnp.linalg.norm(unseen.reshape(3, -1), axis=1)
  np.testing.assert_array_less(jnp.abs(inner), toys.rounding(32) * scale)


def test_known_pixels_are_kept_to_the_bit():
  x, known = images()
  out = zero_shot.keep_pixels(x, known, holes())
  np.testing.assert_array_equal(out[:, :2], known[:, :2])
  np.testing.assert_array_equal(out[:, 2:6, 2:6], x[:, 2:6, 2:6])


def test_grey_is_the_luma_and_of_grey_images_themselves():
  x, _ = images()
  grey = zero_shot.to_gray(x)
  expected = x @ jnp.asarray(zero_shot.LUMA) / sum(zero_shot.LUMA)
  toys.assert_close(grey[..., 1], expected, toys.rounding(16))
  toys.assert_close(zero_shot.to_gray(grey), grey, toys.rounding(16))


def test_shrinking_undoes_enlarging():
  x, _ = images(channels=1)
  np.testing.assert_allclose(
      zero_shot.shrink(zero_shot.enlarge(x, 3), 3), x, atol=1e-6
  )
  assert zero_shot.shrink(x, 4)[0, 0, 1, 0] == pytest.approx(
      float(x[0, :4, 4:, 0].mean()), abs=1e-6
  )


def test_feathered_masks_fade_towards_holes_alone():
  mask = holes(16)
  mask = mask.at[:, 2:6, 2:6].set(1).at[:, 6:10, 6:10].set(0)
  soft = zero_shot.feather(mask, 1.0)
  assert soft.shape == mask.shape
  np.testing.assert_array_equal(soft[:, 6:10, 6:10], 0)
  row = np.asarray(soft[0, 8, :6, 0])
  assert (np.diff(row) <= 1e-6).all() and row[0] == pytest.approx(1, abs=1e-5)
  # One pixel from an edge half a plane away: Phi(1.0) or so of the kernel.
  assert 0.6 < row[5] < 0.9
  np.testing.assert_array_equal(zero_shot.feather(mask, 0.0), mask)
