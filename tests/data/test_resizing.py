"""Crops and resizing, against computations of their own."""

import numpy as np
import pytest

from bcm_jax.data import resizing
from bcm_jax.errors import UserError
from tests.data import pictures

SIZES = [(64, 64), (100, 75), (75, 100), (129, 301), (33, 47), (20, 31)]


def _weights(n_in, n_out, kernel, support):
  """Rows of weights of an antialiased resampling, float64 [n_out, n_in].

  Pillow's documented convention: centres at (i + 0.5) scale, the kernel
  stretched by the scale where it is above 1, weights summing to 1.
  """
  scale = n_in / n_out
  stretch = max(scale, 1.0)
  centre = (np.arange(n_out)[:, None] + 0.5) * scale
  at = np.arange(n_in)[None, :] + 0.5
  w = kernel((at - centre) / stretch)
  w[np.abs(at - centre) > support * stretch] = 0
  return w / w.sum(axis=1, keepdims=True)


def _box(x):
  return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _cubic(x, a=-0.5):
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x):
  return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _resize(image, height, width, kernel, support):
  rows = _weights(image.shape[0], height, kernel, support)
  columns = _weights(image.shape[1], width, kernel, support)
  # Pillow rounds to uint8, halves up, after each of its two passes.
  passed = np.einsum("wj,hjc->hwc", columns, image.astype(np.float64))
  passed = np.clip(np.floor(passed + 0.5), 0, 255)
  passed = np.einsum("hi,iwc->hwc", rows, passed)
  return np.clip(np.floor(passed + 0.5), 0, 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", SIZES)
def test_adm_is_its_definition(height, width, channels):
  image = pictures.noise(height, height, width, channels)
  expected, size = image, 16
  while min(expected.shape[:2]) >= 2 * size:
    half = (side // 2 for side in expected.shape[:2])
    expected = _resize(expected, *half, _box, 0.5)
  h, w = expected.shape[:2]
  scaled = (round(h * size / min(h, w)), round(w * size / min(h, w)))
  expected = _resize(expected, *scaled, _cubic, 2)
  top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
  expected = expected[top : top + size, left : left + size]
  actual = resizing.adm(image, size)
  assert actual.dtype == np.uint8 and actual.shape == (size, size, channels)
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", SIZES)
def test_edm_is_its_definition(height, width, channels):
  image = pictures.noise(height, height, width, channels)
  size, side = 16, min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  square = image[top : top + side, left : left + side]
  expected = _resize(square, size, size, _lanczos, 3)
  actual = resizing.edm(image, size)
  assert actual.dtype == np.uint8 and actual.shape == (size, size, channels)
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("crop", resizing.BY_NAME)
def test_an_image_of_the_right_size_stays_as_it_is(crop):
  image = pictures.noise(0, 16, 16)
  np.testing.assert_array_equal(resizing.BY_NAME[crop](image, 16), image)


def test_the_crops_differ_and_keep_the_centre():
  # A bright centre square between dark sides: no crop may lose it.
  image = np.zeros((64, 128, 3), np.uint8)
  image[:, 32:96] = 255
  for crop in (resizing.adm, resizing.edm):
    # All but the border, which the filters mix with what lies beside it.
    assert crop(image, 32)[:, 2:-2].min() > 240
  noisy = pictures.noise(1, 64, 128)
  assert np.any(resizing.adm(noisy, 32) != resizing.edm(noisy, 32))


def test_sides_round_to_the_nearest():
  # 33 x 47 to a short side of 16: 47 * 16 / 33 = 22.8 becomes 23 columns, of
  # which 3 are cropped on the left. A step there shows where it went.
  image = np.zeros((33, 47, 1), np.uint8)
  image[:, 24:] = 255
  step = resizing.adm(image, 16)[8, :, 0] > 127
  assert step.tolist() == [False] * 9 + [True] * 7


def test_none_wants_the_size():
  image = pictures.noise(0, 16, 12)
  with pytest.raises(UserError, match="16x12.*16x16"):
    resizing.none(image, 16)
