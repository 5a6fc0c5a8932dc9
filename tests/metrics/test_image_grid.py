"""Grids keep every pixel; PNG files are whole or not there."""

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import image_grid


def images(count, height=8, width=6, channels=1, seed=0):
  rng = np.random.default_rng(seed)
  shape = (count, height, width, channels)
  return rng.integers(0, 255, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("scale", [1, 3])
def test_every_image_is_in_its_place(channels, pad, scale):
  pictures = images(7, channels=channels)
  grid = image_grid.image_grid(pictures, 3, pad, scale)
  step_y, step_x = 8 * scale + pad, 6 * scale + pad
  assert grid.dtype == np.uint8
  assert grid.shape == (3 * step_y + pad, 3 * step_x + pad, channels)
  ink = grid.astype(int)
  for index, picture in enumerate(pictures):
    top = pad + index // 3 * step_y
    left = pad + index % 3 * step_x
    for dy in range(scale):
      for dx in range(scale):
        cell = grid[top + dy :: scale, left + dx :: scale][:8, :6]
        np.testing.assert_array_equal(cell, picture)
    ink[top : top + 8 * scale, left : left + 6 * scale] = 255
  assert np.all(ink == 255)  # nothing but background is left


def test_grid_is_nearly_square_by_default():
  assert image_grid.image_grid(images(10), pad=0).shape == (24, 24, 1)
  assert image_grid.image_grid(images(1), pad=0).shape == (8, 6, 1)


def test_grid_background():
  grid = image_grid.image_grid(images(3), 2, background=7)
  assert np.all(grid[0] == 7) and np.all(grid[-9:, -7:] == 7)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_same_pixels(tmp_path, channels):
  picture = images(1, 20, 30, channels)[0]
  path = tmp_path / "grid.png"
  image_grid.save_png(path, picture)
  image_grid.save_png(str(path), picture)  # over what was there
  with PIL.Image.open(path) as opened:
    assert opened.format == "PNG"
    read = np.asarray(opened).reshape(picture.shape)
  np.testing.assert_array_equal(read, picture)
  assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
  path = tmp_path / "grid.png"
  image_grid.save_png(path, images(1)[0])
  before = path.read_bytes()

  def full_disk(self, file, format):  # pylint: disable=redefined-builtin
    file.write(b"half")
    raise OSError("no space left on device")

  monkeypatch.setattr(PIL.Image.Image, "save", full_disk)
  with pytest.raises(OSError, match="no space"):
    image_grid.save_png(path, images(1, seed=1)[0])
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_captioned_rows_hold_all_images_right_of_the_titles():
  top, bottom = images(4, seed=1), images(4, seed=2)
  picture = image_grid.captioned_rows(
    [("original", top), ("reconstruction", bottom)], pad=1, scale=3
  )
  strip_height, strip_width = 3 * 8 + 2, 4 * (3 * 6 + 1) + 1
  assert picture.shape[0] == 2 * strip_height and picture.shape[2] == 1
  margin = picture.shape[1] - strip_width
  assert margin > 20
  for row, pictures in enumerate((top, bottom)):
    part = picture[row * strip_height : (row + 1) * strip_height]
    np.testing.assert_array_equal(
      part[:, margin:], image_grid.image_grid(pictures, 4, 1, 3)
    )
    ink = np.argwhere(part[:, :margin, 0] < 128)
    assert len(ink) > 20
    assert ink.min() >= 1 and ink[:, 1].max() < margin - 1


@pytest.mark.parametrize("title", ["reconstruction", "j", "latent\nsigma = 80"])
def test_titles_are_whole(title):
  roomy = PIL.Image.new("L", (300, 100), 255)
  font = PIL.ImageFont.load_default()
  PIL.ImageDraw.Draw(roomy).text((50, 30), title, fill=0, font=font)
  rows = [(title, np.full((1, 8, 8, 1), 255, np.uint8))]
  picture = image_grid.captioned_rows(rows)
  ink = 255.0 * picture.size - picture.sum()
  assert ink == np.sum(255.0 - np.asarray(roomy)) > 0


def test_titles_are_readable_on_dark_and_differ():
  def title(text):
    rows = [(text, images(1))]
    picture = image_grid.captioned_rows(rows, scale=4, background=0)
    return picture[:, : -(4 * 6 + 2)]

  assert title("latent").max() > 200
  assert not np.array_equal(title("ab"), title("ba"))
  assert title("").shape[1] < title("i").shape[1]


def test_rows_may_differ_in_length_size_and_colour():
  picture = image_grid.captioned_rows(
    [
      ("grey\nsmall", images(2, 4, 4, 1)),
      ("\u03c3 = 80", images(5, 16, 16, 3)),
    ]
  )
  assert picture.shape[2] == 3 and picture.dtype == np.uint8


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: image_grid.image_grid(images(3) / 255.0), "float64"),
    (lambda: image_grid.image_grid(images(3)[0]), "of shape"),
    (lambda: image_grid.image_grid(images(3, channels=4)), "expected 1 or 3"),
    (lambda: image_grid.image_grid(images(3)[:0]), "n >= 1"),
    (lambda: image_grid.image_grid(images(3), columns=0), "columns: got 0"),
    (lambda: image_grid.image_grid(images(3), scale=0), "scale: got 0"),
    (lambda: image_grid.image_grid(images(3), pad=-1), "pad: got -1"),
    (lambda: image_grid.captioned_rows([]), "rows: got 0"),
    (
      lambda: image_grid.captioned_rows([("x", images(2) / 2)]),
      "row 'x': got float64",
    ),
  ],
)
def test_bad_pictures_are_user_errors(call, words):
  with pytest.raises(UserError, match=words):
    call()


def test_bad_png_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match="a.png: got"):
    image_grid.save_png(tmp_path / "a.png", images(3))
  with pytest.raises(UserError, match="a.png: got"):
    image_grid.save_png(tmp_path / "a.png", images(1)[0] / 255.0)
  with pytest.raises(UserError, match="does not exist"):
    image_grid.save_png(tmp_path / "none" / "a.png", images(1)[0])
  assert not list(tmp_path.iterdir())
