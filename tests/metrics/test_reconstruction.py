"""Per-pixel error on the [0, 1] scale."""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import reconstruction


def images(seed, shape=(5, 8, 8, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_is_the_mean_over_pixels_and_channels_of_each_image():
  a, b = images(0), images(1)
  expected = [
    np.mean((x.astype(float) / 255 - y.astype(float) / 255) ** 2)
    for x, y in zip(a, b, strict=True)
  ]
  found = reconstruction.per_pixel_mse(a, b)
  assert found.dtype == np.float64 and found.shape == (5,)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  np.testing.assert_array_equal(found, reconstruction.per_pixel_mse(b, a))


def test_uint8_does_not_wrap_around():
  black = np.zeros((2, 4, 4, 1), np.uint8)
  white = np.full_like(black, 255)
  np.testing.assert_array_equal(
    reconstruction.per_pixel_mse(black, white), [1.0, 1.0]
  )
  np.testing.assert_array_equal(
    reconstruction.per_pixel_mse(white, white), [0.0, 0.0]
  )


def test_one_grey_level():
  a = images(0, (1, 8, 8, 1)) // 2
  found = reconstruction.per_pixel_mse(a, a + np.uint8(1))
  np.testing.assert_allclose(found, [255.0**-2])
  np.testing.assert_allclose(reconstruction.psnr(found), [48.1308], atol=1e-4)


def test_psnr_of_known_errors():
  np.testing.assert_allclose(
    reconstruction.psnr([1.0, 0.1, 1e-3]), [0.0, 10.0, 30.0]
  )
  assert reconstruction.psnr(0.0) == np.inf


@pytest.mark.parametrize(
  "a, b, words",
  [
    (images(0), images(0)[:4], "in pairs"),
    # Would broadcast to a number that means nothing.
    (images(0), images(0)[..., :1], "in pairs"),
    (images(0), images(0) / 255.0, "reconstruction: got float64"),
    (images(0) / 255.0, images(0), "original: got float64"),
    (images(0)[:0], images(0)[:0], "at least one image"),
  ],
)
def test_bad_input_is_a_user_error(a, b, words):
  with pytest.raises(UserError, match=words):
    reconstruction.per_pixel_mse(a, b)


def test_negative_mse_is_a_user_error():
  with pytest.raises(UserError, match="expected >= 0"):
    reconstruction.psnr([0.1, -0.1])
