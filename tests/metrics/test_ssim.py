"""Structural similarity against scikit-image and closed forms."""

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import ssim

# skimage.metrics.structural_similarity of scikit-image 0.26.0 with
# gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
# data_range=255, channel_axis=-1, for pair(*case).
SCIKIT_IMAGE = {
  (0, 11, 11, 1, 20): 0.8709016589755251,
  (1, 16, 24, 3, 5): 0.988502132245408,
  (2, 32, 32, 3, 40): 0.6524671586916938,
  (3, 64, 64, 1, 10): 0.9556317369832632,
  (4, 13, 40, 3, 100): 0.29257412171529573,
}


def pair(seed, height, width, channels, noise):
  """A pattern and the same with noise, of integers only."""
  rng = np.random.default_rng(seed)
  y, x, c = np.ogrid[:height, :width, :channels]
  image = (9 * x + 5 * y + 60 * c) % 256
  other = image + rng.integers(-noise, noise + 1, image.shape)
  return image.astype(np.uint8), np.clip(other, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("case", SCIKIT_IMAGE)
def test_is_that_of_scikit_image(case):
  a, b = (image[None] for image in pair(*case))
  (found,) = ssim.structural_similarity(a, b)
  assert found == pytest.approx(SCIKIT_IMAGE[case], rel=1e-12)
  assert ssim.structural_similarity(b, a) == pytest.approx(found)


def test_flat_images_compare_by_their_means():
  a = np.full((1, 16, 16, 1), 100, np.uint8)
  b = np.full((1, 16, 16, 1), 140, np.uint8)
  c1 = (0.01 * 255) ** 2
  expected = (2 * 100 * 140 + c1) / (100**2 + 140**2 + c1)
  assert ssim.structural_similarity(a, b) == pytest.approx(expected)


def test_equal_images_are_one_and_negatives_are_below_zero():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 12, 17, 3), dtype=np.uint8)
  found = ssim.structural_similarity(images, images)
  np.testing.assert_allclose(found, 1.0, rtol=1e-13)
  assert np.all(ssim.structural_similarity(images, 255 - images) < -0.5)


def test_batches_of_any_size_are_image_by_image():
  rng = np.random.default_rng(1)
  a, b = rng.integers(0, 256, (2, 150, 11, 12, 1), dtype=np.uint8)
  found = ssim.structural_similarity(a, b)
  one_by_one = [
    ssim.structural_similarity(a[i : i + 1], b[i : i + 1])[0]
    for i in range(150)
  ]
  assert found.shape == (150,) and found.dtype == np.float64
  np.testing.assert_allclose(found, one_by_one, rtol=1e-12)


@pytest.mark.parametrize(
  "a, b, words",
  [
    ((2, 10, 30, 1), None, "images: got 10 x 30 pixels, expected 11 x 11"),
    ((2, 12, 12, 1), (1, 12, 12, 1), "in pairs"),
    ((12, 12, 1), None, "pass a batch"),
    ((0, 12, 12, 1), None, "pass a batch"),
  ],
)
def test_bad_shapes_are_user_errors(a, b, words):
  with pytest.raises(UserError, match=words):
    ssim.structural_similarity(
      np.zeros(a, np.uint8), np.zeros(b or a, np.uint8)
    )


def test_floats_are_a_user_error():
  images = np.zeros((1, 12, 12, 1))
  with pytest.raises(UserError, match="original: got float64"):
    ssim.structural_similarity(images, images)
