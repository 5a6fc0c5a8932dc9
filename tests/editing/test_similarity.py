"""Numbers of images beside their originals."""

import numpy as np
import pytest

from bcm_jax.editing import similarity


def test_lpips_is_asked_in_blocks_of_images_in_minus_one_to_one(monkeypatch):
  monkeypatch.setattr(
      similarity.vgg_names, "load_lpips", lambda *paths: {"paths": paths}
  )
  seen = []

  def distance(params, x, y):
    assert params == {"paths": ("vgg.pth", "linear.pth")}
    assert -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
    seen.append(len(x))
    return np.abs(x - y).mean((1, 2, 3))

  monkeypatch.setattr(similarity.lpips, "distance", distance)
  measure = similarity.perceptual(("vgg.pth", "linear.pth"))
  a, b = np.random.default_rng(0).integers(0, 256, (2, 150, 4, 4, 3), np.uint8)
  found = measure(a, b)
  assert seen == [64, 64, 22]
  np.testing.assert_allclose(
      found, np.abs(a / 127.5 - b / 127.5).mean((1, 2, 3)), rtol=1e-5
  )
  assert similarity.perceptual(()) is None


@pytest.mark.parametrize("side", [10, 11])
def test_numbers_of_a_known_difference(side):
  a = np.full((2, side, side, 1), 100, np.uint8)
  b = a.copy()
  b[1] += 51  # A fifth of the range.
  numbers = similarity.errors(a, b, lambda x, y: np.array([1.0, 3.0]))
  assert numbers["images"] == 2 and numbers["lpips"] == 2.0
  assert numbers["mse"] == pytest.approx(0.02)
  assert numbers["mse_worst_image"] == pytest.approx(0.04)
  assert numbers["psnr"] == pytest.approx(-10 * np.log10(0.02))
  # Its window is 11 pixels wide.
  assert ("ssim" in numbers) == (side == 11)
  assert "lpips" not in similarity.errors(a, b, None)
