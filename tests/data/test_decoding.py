"""Image files to pixels: modes, damage, threads."""

import io
import threading
import time
import warnings

import numpy as np
from PIL import Image
import pytest

from bcm_jax.data import decoding
from bcm_jax.errors import UserError
from bcm_jax.utils import thread_pool
from tests.data import pictures


def _saved(picture, kind="png", **options):
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_pixels_come_back(kind):
  pixels = pictures.noise(0, 5, 7)
  content = pictures.encode(pixels, kind)
  decoder = decoding.Decoder()
  np.testing.assert_array_equal(decoder(content, "x"), pixels)
  assert decoder.shape(content, "x") == (5, 7, 3)


def test_webp_without_loss():
  pixels = pictures.noise(0, 5, 7)
  content = pictures.encode(pixels, "webp", lossless=True)
  np.testing.assert_array_equal(decoding.Decoder()(content, "x"), pixels)


def test_grey_becomes_rgb_and_stays_grey_where_asked():
  pixels = pictures.noise(1, 4, 6, 1)
  content = pictures.encode(pixels)
  np.testing.assert_array_equal(
      decoding.Decoder(3)(content, "x"), np.repeat(pixels, 3, axis=2)
  )
  np.testing.assert_array_equal(decoding.Decoder(1)(content, "x"), pixels)


def test_rgb_becomes_grey_by_luma():
  pixels = pictures.noise(2)
  grey = decoding.Decoder(1)(pictures.encode(pixels), "x")
  # ITU-R 601-2, which PIL documents for mode L.
  luma = pixels @ np.array([0.299, 0.587, 0.114])
  assert grey.shape == (8, 8, 1)
  assert np.abs(grey[..., 0] - luma).max() < 1


def test_transparency_is_dropped():
  pixels = pictures.noise(3, 4, 4, 4)
  content = pictures.encode(pixels)
  np.testing.assert_array_equal(
      decoding.Decoder()(content, "x"), pixels[..., :3]
  )


@pytest.mark.parametrize("transparency", [None, b"\x00\x80\xff"])
def test_palettes_are_looked_up_without_a_warning(transparency):
  picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
  colours = np.array([[255, 0, 0], [0, 9, 0], [1, 2, 3]], np.uint8)
  picture.putpalette(colours.tobytes())
  options = {} if transparency is None else {"transparency": transparency}
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    got = decoding.Decoder()(_saved(picture, **options), "x")
  np.testing.assert_array_equal(got, colours[[[0, 1], [2, 1]]])


def test_cmyk_becomes_rgb():
  cmyk = np.zeros((8, 8, 4), np.uint8)
  cmyk[..., 0] = 255  # Cyan: no red.
  content = _saved(Image.fromarray(cmyk, "CMYK"), "jpeg", quality=95)
  got = decoding.Decoder()(content, "x")
  assert got.shape == (8, 8, 3)
  assert got[..., 0].max() < 10 and got[..., 1:].min() > 245


def test_more_than_eight_bits_are_refused():
  deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
  with pytest.raises(UserError, match="deep.png"):
    decoding.Decoder()(_saved(deep), "deep.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_file_cut_short_is_named(kind, share):
  content = pictures.encode(pictures.noise(4, 32, 32), kind)
  cut = content[: int(len(content) * share)]
  with pytest.raises(decoding.CorruptImage, match="a/b.img"):
    decoding.Decoder()(cut, "a/b.img")


def test_an_error_is_one_line_and_says_what_to_do():
  with pytest.raises(decoding.CorruptImage) as error:
    decoding.Decoder()(b"GIF89a is not\nan image", "a.png")
  assert "\n" not in str(error.value)
  assert "data.skip_corrupt=True" in str(error.value)


def test_a_size_crops_and_names_the_file_that_cannot_be():
  content = pictures.encode(pictures.noise(5, 20, 30))
  sized = decoding.Decoder(size=16)
  assert sized(content, "x").shape == sized.shape(b"", "x") == (16, 16, 3)
  with pytest.raises(UserError, match="my.png.*20x30"):
    decoding.Decoder(size=16, crop="none")(content, "my.png")


def test_npy_is_channels_first():
  pixels = pictures.noise(6, 4, 6)
  buffer = io.BytesIO()
  np.save(buffer, np.moveaxis(pixels, -1, 0))
  content = buffer.getvalue()
  np.testing.assert_array_equal(decoding.Decoder()(content, "x"), pixels)
  assert decoding.Decoder().shape(content, "x") == (4, 6, 3)
  with pytest.raises(decoding.CorruptImage, match="x.npy"):
    decoding.Decoder()(content[:-1], "x.npy")


def test_latents_are_refused():
  buffer = io.BytesIO()
  np.save(buffer, np.zeros((8, 4, 4), np.float32))
  with pytest.raises(UserError, match=r"float32.*\(8, 4, 4\)"):
    decoding.Decoder()(buffer.getvalue(), "x")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(channels=4), "channels.*4"),
        (dict(crop="admm"), "crop.*'admm'.*'adm'"),
        (dict(size=0), "size.*0"),
    ],
)
def test_settings_that_cannot_be(settings, words):
  with pytest.raises(UserError, match=words):
    decoding.Decoder(**settings)


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 50])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_every_number_is_called_once(n, threads):
  called = []
  thread_pool.for_each(called.append, n, threads)
  assert sorted(called) == list(range(n))


def test_the_lowest_failure_is_raised():
  def fail(k):
    if k in (3, 8):
      # The later one fails first.
      time.sleep(0.05 if k == 3 else 0)
      raise ValueError(k)

  with pytest.raises(ValueError, match="^3$"):
    thread_pool.for_each(fail, 10, 2)


def test_threads_work_at_the_same_time():
  both = threading.Barrier(2, timeout=10)
  thread_pool.for_each(lambda k: both.wait(), 2, 2)
  assert not both.broken
