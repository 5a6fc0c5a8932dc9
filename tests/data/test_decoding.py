"""Image files to pixels: modes, damage, threads."""

import io
import struct
import threading
import time
import warnings
import zlib

import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import PngImagePlugin
import pytest

from bcm_jax.data import decoding
from bcm_jax.data import folder
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


def _turned(pixels, kind, orientation, **options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = _saved(Image.fromarray(pixels), kind, exif=exif, **options)
  return content, ImageOps.exif_transpose(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(kind, orientation):
  content, shown = _turned(pictures.noise(7, 6, 10), kind, orientation)
  shown = np.asarray(shown.convert("RGB"))
  decoder = decoding.Decoder()
  np.testing.assert_array_equal(decoder(content, "x"), shown)
  assert decoder.shape(content, "x") == shown.shape


def test_published_sets_are_not_turned():
  content, _ = _turned(pictures.noise(7, 6, 10), "png", 6)
  decoder = decoding.Decoder(upright=False)
  np.testing.assert_array_equal(
      decoder(content, "x"), pictures.noise(7, 6, 10)
  )
  assert decoder.shape(content, "x") == (6, 10, 3)


@pytest.mark.parametrize("exif", [
    b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0",
])
def test_a_damaged_exif_does_not_damage_the_image(exif):
  content = pictures.encode(pictures.noise(7, 6, 10), "jpeg", exif=exif)
  assert decoding.Decoder()(content, "x").shape == (6, 10, 3)
  assert decoding.Decoder().shape(content, "x") == (6, 10, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(orientation):
  content, _ = _turned(pictures.noise(7, 6, 10), "png", orientation)
  assert decoding.Decoder()(content, "x").shape == (6, 10, 3)


_FRAME = Image.new("RGB", (9, 8))


@pytest.mark.parametrize("suffix, kind, options", [
    ("tif", "tiff", {}), ("tiff", "tiff", {"compression": "tiff_lzw"}),
    ("ppm", "ppm", {}), ("pnm", "ppm", {}), ("tga", "tga", {}),
    ("dib", "dib", {}), ("jp2", "jpeg2000", {}), ("apng", "png", {}),
    ("png", "png", {"save_all": True, "append_images": [_FRAME]}),
    ("webp", "webp", {"lossless": True}), ("gif", "gif", {}),
    ("jfif", "jpeg", {}), ("jpe", "jpeg", {}), ("avif", "avif", {}),
    # The content counts, as browsers save a WebP as .jpg.
    ("jpg", "webp", {"lossless": True}), ("pgm", "ppm", {}),
])
def test_every_suffix_is_read_from_a_folder(tmp_path, suffix, kind, options):
  pixels = np.full((8, 9, 3), 90, np.uint8)
  file = tmp_path / f"a.{suffix}"
  Image.fromarray(pixels).save(file, kind, **options)
  got = folder.data_set(str(tmp_path), decoding.Decoder()).open("train", None)
  assert np.abs(got.fetch(np.arange(1))["image"][0].astype(int) - 90).max() < 3


def _png16(mode):
  """Returns a PNG of 1x1 pixels with 16 bits per channel, which PIL reads."""

  def chunk(kind, content):
    sum_ = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + sum_

  header = struct.pack(">IIBBBBB", 1, 1, 16, mode, 0, 0, 0)
  pixels = zlib.compress(bytes(1 + 2 * {0: 1, 2: 3, 6: 4}[mode]))
  return b"\x89PNG\r\n\x1a\n" + b"".join(
      (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
  )


def _tiff16():
  """Returns a TIFF of 1x1 RGB pixels with 16 bits per channel."""
  at = 8 + 2 + 9 * 12 + 4
  entries = [
      (256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, at), (259, 3, 1, 1),
      (262, 3, 1, 2), (273, 4, 1, at + 6), (277, 3, 1, 3), (278, 3, 1, 1),
      (279, 4, 1, 6),
  ]
  table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
  return b"".join((
      b"II*\0", struct.pack("<IH", 8, 9), table, bytes(4),
      struct.pack("<HHH", 16, 16, 16), bytes(6),
  ))


def _with_depth(kind, start, offset, value):
  content = bytearray(pictures.encode(pictures.noise(8), kind))
  content[content.index(start) + offset] = value
  return bytes(content)


@pytest.mark.parametrize("content", [
    _png16(0), _png16(2), _png16(6), _tiff16(),
    b"P6 1 1 65535\n" + bytes(6), b"P3 1 1 1023\n 1 2 3",
    _saved(Image.new("F", (4, 4)), "tiff"),
    _saved(Image.new("I", (4, 4)), "tiff"),
    _saved(Image.new("I;16", (4, 4)), "jpeg2000"),
    _with_depth("jpeg2000", b"\xff\x4f\xff\x51", 42, 11),
    _with_depth("avif", b"pixi", 9, 10),
])
def test_deep_images_are_refused_before_bits_are_lost(content):
  with pytest.raises(UserError, match="a.img.*bits|a.img.*decoded"):
    decoding.Decoder()(content, "a.img")


def _claiming(kind, size, at, layout):
  content = bytearray(pictures.encode(pictures.noise(0), kind))
  content[at : at + 8] = struct.pack(layout, size, size)
  if kind == "png":
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
  return bytes(content)


@pytest.mark.parametrize("content", [
    _claiming("png", 200_000, 16, ">II"), _claiming("bmp", 60_000, 18, "<ii"),
    b"P6 90000 90000 255\n",
])
def test_too_many_pixels_are_not_called_corrupt(content):
  decoder = decoding.Decoder()
  for read in (decoder, decoder.shape):
    with pytest.raises(UserError, match="a.img: too large") as error:
      read(content, "a.img")
    assert not isinstance(error.value, decoding.CorruptImage)


def test_a_png_with_much_text_is_read():
  info = PngImagePlugin.PngInfo()
  info.add_text("workflow", "x" * 3_000_000, zip=True)
  content = pictures.encode(pictures.noise(0), pnginfo=info)
  np.testing.assert_array_equal(
      decoding.Decoder()(content, "x"), pictures.noise(0)
  )


@pytest.mark.parametrize("content", [
    _saved(Image.new("RGB", (8, 8)), "eps"), b"<svg/>", b"<html>403</html>",
    _saved(Image.new("RGB", (16, 16)), "ico"),
    b"version https://git-lfs.github.com/spec/v1\n", b"P6 0 0 255\n",
])
def test_other_formats_are_named_and_start_no_program(content):
  with pytest.raises(decoding.CorruptImage, match="a.png"):
    decoding.Decoder()(content, "a.png")


@pytest.mark.parametrize("mode", ["LA", "PA", "LAB", "RGBX", "YCbCr", "CMYK"])
def test_other_modes_become_rgb_or_gray(mode):
  picture = Image.new("P" if mode == "PA" else "RGB", (8, 8)).convert(mode)
  kind = "jpeg" if mode == "YCbCr" else "tiff"
  for channels in (1, 3):
    shape = decoding.Decoder(channels)(_saved(picture, kind), "x").shape
    assert shape == (8, 8, channels)


def test_an_encoded_image_above_a_gigabyte_is_not_read(tmp_path):
  with open(tmp_path / "a.bmp", "wb") as f:
    f.truncate(2**30 + 1)
  with pytest.raises(UserError, match="a.bmp: too large"):
    folder.data_set(str(tmp_path), decoding.Decoder())
