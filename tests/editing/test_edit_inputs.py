"""Image files that people bring: turned, cut, resized, refused."""

import io

import numpy as np
import PIL.Image
import pytest

from bcm_jax import errors
from bcm_jax.editing import edit_inputs


def content_of(array, kind="PNG", **options):
  file = io.BytesIO()
  PIL.Image.fromarray(array).save(file, kind, **options)
  return file.getvalue()


def with_a_block(height, width, rows, columns):
  image = np.zeros((height, width), np.uint8)
  image[rows, columns] = 255
  return image


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 16, 1), (6, 4, 3)])
@pytest.mark.parametrize("size", [(40, 40), (20, 60), (64, 16), (3, 5)])
def test_any_size_becomes_that_of_the_network(shape, size):
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  found = edit_inputs.read_image(content_of(image), "a.png", shape, True)
  assert found.shape == shape and found.dtype == np.uint8


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 16, 1), (16, 8, 1)])
@pytest.mark.parametrize("size", [(32, 96), (96, 32), (48, 48)])
def test_masks_stay_on_what_they_were_drawn_on(shape, size):
  block = with_a_block(*size, slice(size[0] // 2 - 8, size[0] // 2 + 8),
                       slice(size[1] // 2 - 8, size[1] // 2 + 8))
  image = edit_inputs.read_image(content_of(block), "a.png", shape, True)
  mask = edit_inputs.read_mask(content_of(block), "m.png", shape, True)
  # Where the object covers a pixel by half, filters differ.
  sure = (image[..., 0] > 200) | (image[..., 0] < 55)
  assert mask.any() and not mask.all() and sure.mean() > 0.6
  np.testing.assert_array_equal(mask[sure], image[..., 0][sure] > 127)


def test_a_thin_stroke_of_half_a_pixel_counts_and_less_does_not():
  for width, holes in ((2, 8), (1, 0)):
    stroke = with_a_block(32, 32, slice(None), slice(16, 16 + width))
    if holes:
      found = edit_inputs.read_mask(
        content_of(stroke), "m.png", (8, 8, 1), True
      )
      assert found.sum() == holes and found[:, 4].all()
    else:
      with pytest.raises(errors.UserError, match="m.png"):
        edit_inputs.read_mask(content_of(stroke), "m.png", (8, 8, 1), True)


@pytest.mark.parametrize(
  "orientation, corner",
  [
    (1, (0, 0)),
    (3, (7, 7)),
    (6, (0, 7)),
    (8, (7, 0)),
  ],
)
def test_photographs_are_turned_as_the_camera_was_held(orientation, corner):
  image = with_a_block(32, 32, slice(0, 4), slice(0, 4))
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  content = content_of(image, "JPEG", exif=exif, quality=95)
  found = edit_inputs.read_image(content, "a.jpg", (8, 8, 1), True)[..., 0]
  assert np.unravel_index(found.argmax(), found.shape) == corner


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"<svg></svg>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    content_of(np.arange(4096, dtype=np.uint8).reshape(64, 64))[:-40],
    content_of(np.zeros((8, 8), np.uint8), "GIF"),
  ],
)
def test_what_is_no_image_is_refused(content):
  with pytest.raises(errors.UserError, match="x.png"):
    edit_inputs.open_picture(content, "x.png")


def test_large_images_are_refused_before_they_are_decoded():
  # Its pixels are missing: decoding would say so.
  content = content_of(np.zeros((900, 900), np.uint8))[:60]
  with pytest.raises(errors.UserError, match="x.png.*900x900"):
    edit_inputs.open_picture(content, "x.png", 800_000)


def test_deep_images_are_refused():
  deep = np.zeros((8, 8), np.uint16)
  with pytest.raises(errors.UserError, match="x.png"):
    edit_inputs.open_picture(content_of(deep), "x.png")
