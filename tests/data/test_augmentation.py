"""Augmentation against the official pipe, closed forms and exact rates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bcm_jax.data import augmentation
from bcm_jax.data import warp
from bcm_jax.errors import UserError
from tests import golden
from tests.parity import augment

FILE = "edm_augment"
TRANSFORMS = {  # Multiplier: random calls of the official pipe, label columns.
    "xflip": (2, (0,)),
    "yflip": (2, (1,)),
    "scale": (2, (2,)),
    "rotate_frac": (2, (3, 4)),
    "aniso": (4, (5, 6)),
    "translate_frac": (2, (7, 8)),
}
ALWAYS = augmentation.AugmentPipe(**dict.fromkeys(TRANSFORMS, 1.0))
draw = jax.jit(augmentation.draw)
apply = jax.jit(augmentation.apply, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=0)
def labels_of(pipe, draws):
  # The images are not asked for, so they are not computed.
  x = jnp.zeros((len(draws.scale), 2, 2, 1), draws.scale.dtype)
  return augmentation.apply(pipe, x, draws)[1]


def recorded():
  """The file's pipe and the numbers of its calls."""
  file = golden.load(FILE)
  names = sorted(key for key in file.arrays if key.startswith("in/draw"))
  pipe = augmentation.AugmentPipe(**file.meta["constructor"])
  return pipe, [file[name] for name in names]


def noise(*shape):
  return np.random.default_rng(0).uniform(-1, 1, shape)


def drawn(n, **given):
  """Draws with which no transform of `ALWAYS` happens but those given."""
  fields = {name: np.zeros(n) for name in augmentation.Draws._fields}
  fields |= dict(shift=np.zeros((n, 2)), gates=np.ones((n, 6)))
  return augmentation.Draws(**(fields | given))


def only(n, transform, **given):
  gates = np.ones((n, 6))
  gates[:, list(TRANSFORMS).index(transform)] = 0
  return drawn(n, gates=gates, **given)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@functools.cache
def many():
  """Keys and what is drawn from them."""
  keys = jax.random.split(jax.random.key(3), 20_000)
  return keys, jax.tree.map(np.asarray, draw(keys))


# --- the official pipe


@pytest.mark.parametrize("margin", ["exact", "widest"])
def test_official_numbers_in_float64(x64, margin):
  file = golden.load(FILE)
  pipe, numbers = recorded()
  x = jnp.asarray(file.image("in/x"))
  draws = augment.recorded_draws(pipe, numbers)
  if margin == "exact":
    rel, pixels = 1e-12, augment.exact_margin(pipe, draws, x.shape[1:])
  else:  # The official margin cuts off the filter's tail by a little.
    rel, pixels = 1e-6, None
  y, labels = apply(pipe, x, draws, pixels)
  assert y.dtype == labels.dtype == jnp.float64
  golden.close(y, file, "y", rel)
  golden.close(labels, file, "labels", 1e-12)


def test_official_numbers_in_float32():
  file = golden.load(FILE)
  pipe, numbers = recorded()
  x = jnp.asarray(file.image("in/x"), jnp.float32)
  y, labels = apply(pipe, x, augment.recorded_draws(pipe, numbers), None)
  assert y.dtype == labels.dtype == jnp.float32
  golden.close(y, file, "y")
  golden.close(labels, file, "labels")


@pytest.mark.parametrize("off", TRANSFORMS)
def test_a_transform_that_is_off_draws_nothing(x64, off):
  # The official pipe skips its calls: the rest must land where they belong.
  pipe, numbers = recorded()
  names = list(TRANSFORMS)
  calls = np.repeat(names, [TRANSFORMS[name][0] for name in names])
  left = [v for v, name in zip(numbers, calls, strict=True) if name != off]
  less = dataclasses.replace(pipe, **{off: 0})
  labels = labels_of(less, augment.recorded_draws(less, left))
  expected = golden.load(FILE)["out64/labels"].copy()
  expected[:, TRANSFORMS[off][1]] = 0
  np.testing.assert_allclose(labels, expected, rtol=0, atol=1e-13)
  columns = set(range(augmentation.LABEL_DIM)) - set(TRANSFORMS[off][1])
  assert set(less.label_columns) == columns
  with pytest.raises(ValueError, match=f"{len(numbers)} recorded calls"):
    augment.recorded_draws(less, numbers)


def test_recorded_gates_are_compared_with_p():
  pipe, numbers = recorded()
  rare = dataclasses.replace(pipe, p=0.3)
  draws = augment.recorded_draws(rare, numbers)
  always = labels_of(pipe, draws)
  happened = np.ones(always.shape, bool)
  for column, call in ((1, 3), (2, 5), (3, 7), (4, 7), (5, 10), (6, 10),
                       (7, 13), (8, 13)):
    happened[:, column] = numbers[call].ravel() < 0.3
  assert 0 < happened[:, 2:].mean() < 1
  np.testing.assert_array_equal(
      labels_of(rare, draws), np.where(happened, always, 0)
  )


# --- the filter


def test_taps_are_an_orthonormal_low_pass_with_six_vanishing_moments():
  taps = np.array(warp.SYM6)
  assert taps.shape == (12,)
  assert abs(taps.sum() - np.sqrt(2)) < 1e-11
  for shift in range(6):
    product = taps[2 * shift :] @ taps[: 12 - 2 * shift]
    assert abs(product - (shift == 0)) < 1e-11
  # The sixth moment, not 0, shows the scale of what counts as 0.
  k = (np.arange(12) - 5.5) / 5.5
  moments = [((-1) ** np.arange(12) * k**j) @ taps for j in range(7)]
  assert np.abs(moments[:6]).max() < 1e-11
  assert abs(moments[6]) > 1e-3


# --- closed forms


def delay():
  """Pixels by which the filter misses the origin, the sixth tap.

  Up and down cancel, unless the image is turned or scaled in between.
  """
  taps = np.array(warp.SYM6)
  pixels = 5 - taps @ np.arange(12) / taps.sum()
  assert 0.01 < abs(pixels) < 0.1
  return pixels


def test_nothing_happening_changes_nothing(x64):
  x = noise(3, 16, 12, 3)
  y, labels = apply(ALWAYS, x, drawn(3), None)
  np.testing.assert_allclose(y, x, rtol=0, atol=2e-7)
  np.testing.assert_array_equal(labels, np.zeros((3, 9)))


def test_nothing_happening_changes_nothing_in_float32():
  x = noise(6, 8, 8, 1).astype(np.float32)
  # No rotation, no scale and no shift, although all of them happen.
  draws = drawn(6, gates=np.zeros((6, 6)), angle=np.full(6, 0.5))
  y, labels = apply(ALWAYS, x, draws, None)
  np.testing.assert_allclose(y, x, rtol=0, atol=4e-6)
  np.testing.assert_array_equal(labels, np.zeros((6, 9)))


def test_flips_are_exact():
  pipe = augmentation.AugmentPipe(p=0.2, xflip=1e8, yflip=1)
  assert pipe.label_columns == (0, 1)
  x = noise(4, 5, 6, 2).astype(np.float32)
  gates = np.zeros((4, 6))
  gates[:, 0] = 0.999
  gates[:, 1] = [0.1999, 0.1999, 0.1999, 0.2001]
  draws = drawn(
      4, gates=gates, xflip=np.array([0, 1, 1, 1]), yflip=np.array([1, 0, 1, 1])
  )
  y, labels = apply(pipe, x, draws, None)
  expected = [x[0, ::-1], x[1, :, ::-1], x[2, ::-1, ::-1], x[3, :, ::-1]]
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(labels[:, :2], [[0, 1], [1, 0], [1, 1], [1, 0]])
  assert not labels[:, 2:].any()


def test_whole_pixels_move_unchanged(x64):
  height, width = 16, 12
  x = noise(3, height, width, 3)
  right, down = pixels = np.array([[3, -5, 0], [-2, 0, 4]])
  shift = (pixels / np.array([[width], [height]]) / 0.125).T
  draws = only(3, "translate_frac", shift=shift)
  y, labels = apply(ALWAYS, x, draws, None)
  wide = np.pad(x, [(0, 0), (8, 8), (8, 8), (0, 0)], "reflect")
  for i in range(3):
    moved = wide[i, 8 - down[i] :, 8 - right[i] :][:height, :width]
    np.testing.assert_allclose(y[i], moved, rtol=0, atol=1e-6)
  np.testing.assert_allclose(labels[:, 7:], shift)


def test_beyond_the_reflection_is_nothing(x64):
  # Three widths away not even the reflected margin is left in view.
  far = np.array([[24, 0], [-24, 0], [0, 24]])
  y, _ = apply(
      ALWAYS, noise(3, 16, 12, 3), only(3, "translate_frac", shift=far), None
  )
  np.testing.assert_array_equal(y, np.zeros((3, 16, 12, 3)))


def test_half_a_turn_flips_twice(x64):
  y_at, x_at = np.mgrid[:32, :32]
  ramps = np.stack([0.02 * x_at - 0.3, 0.03 * y_at - 0.5], -1)[None]
  y, labels = apply(ALWAYS, ramps, only(1, "rotate_frac"), None)
  change = (y - ramps[:, ::-1, ::-1])[0, 8:-8, 8:-8]
  expected = np.broadcast_to(delay() * np.array([0.02, 0.03]), change.shape)
  np.testing.assert_allclose(change, expected, rtol=0, atol=1e-6)
  np.testing.assert_allclose(labels[0, 3:5], [-2, 0], atol=1e-15)


@pytest.mark.parametrize("axis", [None, 0.0, 0.25])
def test_scaling_stretches_about_the_centre(x64, axis):
  # Powers of two take whole and half pixels to whole and half pixels.
  x_at, y_at = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5)
  ramps = np.stack([x_at, y_at], -1)[None] / 16
  log2 = np.array([1 / 0.2])
  if axis is None:
    draws, factor = only(1, "scale", scale=log2), np.array([2, 2])
    label = [5, 0, 0, 0, 0]
  else:  # A quarter turn of the axes swaps them.
    turned = axis == 0.25
    draws = only(1, "aniso", aniso=log2, aniso_angle=np.array([axis]),
                 aniso_coin=np.array([0.4 if turned else 0.6]))
    factor = np.array([0.5, 2] if turned else [2, 0.5])
    label = [0, 0, 0, 0, -5] if turned else [0, 0, 0, 5, 0]
  y, labels = apply(ALWAYS, ramps, draws, None)
  expected = (ramps + delay() * (factor - 1) / 32) / factor
  middle = np.s_[:, 13:-13, 13:-13]
  np.testing.assert_allclose(y[middle], expected[middle], rtol=0, atol=1e-6)
  np.testing.assert_allclose(labels[0, 2:7], label, atol=1e-14)


@pytest.mark.slow
def test_a_plain_image_stays_plain(x64):
  draws = jax.tree.map(lambda v: v[:3].astype(np.float64), many()[1])
  draws = draws._replace(shift=draws.shift / 4)
  y, _ = apply(ALWAYS, np.full((3, 16, 12, 3), 0.7), draws, None)
  np.testing.assert_allclose(y, 0.7, rtol=0, atol=1e-6)


# --- keys


def test_an_example_depends_on_nothing_but_its_key():
  keys, draws = many()
  order = np.array([4, 2, 0, 5, 1, 3])
  again = draw(keys[order])
  for a, b in zip(again, draws, strict=True):
    np.testing.assert_array_equal(a, b[order])

  x = noise(6, 8, 8, 1).astype(np.float32)
  draws = augmentation.Draws(*(v[:6] for v in draws))
  y, labels = apply(ALWAYS, x, draws, None)
  for ids in (order, np.array([3] * 6)):  # Other places, other neighbours.
    same = augmentation.Draws(*(v[ids] for v in draws))
    part, part_labels = apply(ALWAYS, x[ids], same, None)
    np.testing.assert_allclose(part, y[ids], rtol=0, atol=2e-6)
    np.testing.assert_allclose(part_labels, labels[ids], rtol=0, atol=1e-6)
  assert len(np.unique(np.round(labels, 3), axis=0)) == 6


def test_rates_follow_the_binomial_law():
  p, draws = 0.12, many()[1]
  n = len(draws.scale)
  happened = np.asarray(labels_of(augmentation.training_pipe(p), draws)) != 0
  rates = [1 / 2, p / 2, p, p, p, p, p / 2, p, p]
  for column, rate in enumerate(rates):
    low, high = stats.binom.interval(1 - 1e-4, n, rate)
    assert low <= happened[:, column].sum() <= high, column
  # Each transform has a gate of its own, and a translation one for both axes.
  np.testing.assert_array_equal(happened[:, 7], happened[:, 8])
  several = happened[:, [1, 2, 3, 5, 7]].all(1).sum()
  assert several <= stats.binom.ppf(1 - 1e-4, n, p**5 / 2)


def test_numbers_have_their_distributions_and_are_independent():
  draws = jax.tree.map(lambda v: np.asarray(v, np.float64), many()[1])
  for coin in (draws.xflip, draws.yflip):
    assert set(coin) == {0, 1}
  normal = [draws.scale, draws.aniso, *draws.shift.T]
  uniform = [draws.angle, draws.aniso_angle, draws.aniso_coin, *draws.gates.T]
  for law, columns in (("norm", normal), ("uniform", uniform)):
    for column in columns:
      assert stats.kstest(column, law).pvalue > 1e-4
  table = np.stack([draws.xflip, draws.yflip, *normal, *uniform])
  assert len(table) == 15
  apart = np.corrcoef(table) - np.eye(15)
  assert np.abs(apart).max() < 4.5 / np.sqrt(table.shape[1])


# --- settings


def test_half_precision_is_promoted():
  x = jnp.ones((1, 4, 4, 1), jnp.bfloat16)
  y, labels = apply(ALWAYS, x, drawn(1), None)
  assert y.dtype == labels.dtype == jnp.float32


def test_the_paper_s_pipe():
  pipe = augmentation.training_pipe(0.12)
  assert pipe == augmentation.AugmentPipe(
      p=0.12, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1,
      translate_frac=1, scale_std=0.2, rotate_frac_max=1, aniso_std=0.2,
      aniso_rotate_prob=0.5, translate_frac_std=0.125,
  )
  assert pipe.label_columns == tuple(range(9))
  assert augmentation.AugmentPipe().label_columns == ()


@pytest.mark.parametrize("name, value", [
    ("p", 1.5),
    ("p", float("nan")),
    ("aniso_rotate_prob", -0.1),
    ("scale", -1),
])
def test_wrong_settings_are_named(name, value):
  with pytest.raises(UserError, match=f"{name}.*{value}"):
    augmentation.AugmentPipe(**{name: value})


def test_margins_wider_than_a_reflection_are_refused():
  def shape(margin):
    call = functools.partial(augmentation.apply, ALWAYS, margin=margin)
    return jax.eval_shape(call, np.zeros((1, 4, 6, 1)), drawn(1))[0].shape

  assert shape(((3, 3), (5, 5))) == (1, 4, 6, 1)
  with pytest.raises(ValueError, match="4, 3"):
    shape(((4, 3), (5, 5)))
