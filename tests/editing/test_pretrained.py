"""The Python object, around an exact network: numbers in closed form."""

import math

import numpy as np
import PIL.Image
import pytest

import bcm_jax
from bcm_jax import errors
from bcm_jax.data import image_source
from bcm_jax.editing import pretrained
from bcm_jax.metrics import class_accuracy
from bcm_jax.sampling import zero_shot
from tests import exact
from tests import gaussian

SD2 = gaussian.SD**2


def model(shape=(8, 8, 1), num_classes=10, **method):
  return pretrained.Model(exact.runner(
      exact.experiment(shape, num_classes, **method)
  ))


@pytest.fixture(scope="module")
def grey():
  return model()


@pytest.fixture(scope="module")
def colour():
  return model((8, 8, 3), None)


def photos(n=6, channels=1, seed=0):
  x = np.random.default_rng(seed).normal(0, 0.4, (n, 8, 8, channels))
  return image_source.to_uint8(np.clip(x, -1, 1))


def near(a, b, grey_levels=1):
  """Flooring may fall either way on the last bit."""
  assert a.dtype == b.dtype == np.uint8 and a.shape == b.shape
  assert np.abs(a.astype(int) - b.astype(int)).max() <= grey_levels


def middle():
  mask = np.zeros((8, 8), bool)
  mask[2:6, 2:6] = True
  return mask


def test_samples_of_a_seed(grey):
  images = grey.sample(7, labels=3, seed=5)
  assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8
  np.testing.assert_array_equal(images[:2], grey.sample(2, 3, 5))
  assert (images != grey.sample(7, 3, 6)).mean() > 0.9
  assert image_source.to_float(grey.sample(200, 3)).std() == pytest.approx(
      0.5, rel=0.1
  )


def test_inversion_is_undone_by_one_jump(grey):
  images = photos()
  latents = grey.invert(images, 3, noise=0.05)
  assert latents.shape == images.shape and latents.dtype == np.float32
  np.testing.assert_array_equal(
      grey.decode(latents, 3), grey.reconstruct(images, 3, noise=0.05)
  )
  # To 40 and back nothing stays but the noise, shrunk with the image.
  added = (
      latents / np.sqrt((SD2 + 1600) / (SD2 + 0.05**2))
      - image_source.to_float(images)
  )
  assert added.std() == pytest.approx(0.05, rel=0.1)
  back = (image_source.to_float(images) + added) * np.sqrt(
      (SD2 + 0.002**2) / (SD2 + 0.05**2)
  )
  near(grey.decode(latents, 3), image_source.to_uint8(back))


@pytest.mark.parametrize("task", ["restore", "purify"])
def test_round_trips_are_inversions_with_their_own_noise(grey, task):
  images = photos()
  out = getattr(grey, task)(images, 3, seed=2)
  assert 3 < np.abs(out.astype(int) - images).mean() < 40
  near(getattr(grey, task)(images, 3, noise=0.002), images)
  # An image of a batch goes its way alone.
  np.testing.assert_array_equal(
      getattr(grey, task)(images[:1], 3, seed=2), out[:1]
  )


def test_interpolation_ends_at_both_images(grey):
  first, second = photos(), photos(seed=1)
  rows = grey.interpolate(first, second, 3, 4, points=5, noise=0.002)
  assert rows.shape == (6, 5, 8, 8, 1)
  near(rows[:, 0], first)
  near(rows[:, -1], second)
  a, b = (image_source.to_float(v) for v in (first, second))
  half = np.arccos(
      (a * b).reshape(6, -1).sum(1)
      / np.linalg.norm(a.reshape(6, -1), axis=1)
      / np.linalg.norm(b.reshape(6, -1), axis=1)
  ) / 2
  middle_of = (a + b) / (2 * np.cos(half))[:, None, None, None]
  near(rows[:, 2], image_source.to_uint8(middle_of), 3)


def test_classes_are_changed_between_inversion_and_generation():
  tinted = model(tint=0.05)
  images = photos()
  out = tinted.relabel(images, 2, 6, noise=0.002)
  near(out, image_source.to_uint8(image_source.to_float(images) + 4 * 0.05), 1)


def brightened(steps, seed=0):
  """Images of the classes `steps`, where classes brighten by 0.3."""
  images = image_source.to_float(photos(len(steps), seed=seed))
  steps = np.asarray(steps)[:, None, None, None]
  return image_source.to_uint8(images + 0.3 * steps)


def test_classes_are_recognised():
  tinted = model(num_classes=3, tint=0.3)
  classes = [0, 2, 1, 2, 0, 1]
  images = brightened(classes)
  found = tinted.classify(images)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, classes)
  # An image of a batch is judged alone.
  np.testing.assert_array_equal(tinted.classify(images[:1]), found[:1])


def test_purification_asks_the_network_for_the_class():
  tinted = model(num_classes=3, tint=0.3)
  images = brightened([2, 0, 1])
  np.testing.assert_array_equal(
    tinted.purify(images), tinted.purify(images, tinted.classify(images))
  )
  assert (tinted.purify(images) != tinted.purify(images, 0)).any()


def test_directions_move_images_to_the_other_group(grey):
  dark, light = photos(40), photos(40, seed=1)
  light = np.clip(light.astype(int) + 64, 0, 255).astype(np.uint8)
  way = grey.direction(light, dark, 3, noise=0.01)
  assert way.shape == (8, 8, 1) and way.dtype == np.float32
  moved = grey.shift(dark, way, 1.0, 3, noise=0.002)
  assert moved.mean() == pytest.approx(light.mean(), abs=5)
  back = grey.shift(light, way, -1.0, 3, noise=0.002)
  assert back.mean() == pytest.approx(dark.mean(), abs=5)


@pytest.mark.parametrize("task", ["inpaint", "inpaint_cm"])
def test_holes_are_filled_and_the_rest_is_untouched(grey, task):
  images, mask = photos(), middle()
  out = grey.inpaint(images, mask, 3, task=task)
  np.testing.assert_array_equal(out[:, ~mask], images[:, ~mask])
  other = np.where(mask[None, ..., None], np.uint8(7), images)
  np.testing.assert_array_equal(grey.inpaint(other, mask, 3, task=task), out)
  assert (out[:, mask] != images[:, mask]).mean() > 0.8
  # Each image may have holes of its own.
  masks = np.stack([np.roll(mask, i, axis=1) for i in range(6)])
  out = grey.inpaint(images, masks, 3, task=task)
  np.testing.assert_array_equal(out[~masks], images[~masks])


def test_colours_come_and_the_luma_stays(colour):
  images = photos(channels=3)
  grey_images = image_source.to_uint8(
    np.asarray(zero_shot.to_gray(image_source.to_float(images)))
  )
  out = colour.colorize(images)
  near(out, colour.colorize(grey_images), 3)
  luma = [
    np.asarray(zero_shot.to_gray(image_source.to_float(v)))[..., 0]
    for v in (out, images)
  ]
  assert np.abs(luma[0] - luma[1]).max() < 0.02
  assert np.std(out, axis=-1).mean() > 10


def test_details_come_and_the_means_stay(grey):
  small = image_source.to_uint8(
    0.5 * image_source.to_float(photos())[:, ::2, ::2]
  )
  out = grey.super_resolve(small, 2, 3)
  assert out.shape == (6, 8, 8, 1)
  assert (out == 0).any() or (out == 255).any()
  means = np.asarray(zero_shot.shrink(image_source.to_float(out), 2))
  assert np.abs(means - image_source.to_float(small)).max() < 0.02


@pytest.mark.parametrize("level", [None, 0.5])
def test_noise_is_taken_out(grey, level):
  clean = image_source.to_float(photos(8))
  noisy = clean + 0.5 * np.random.default_rng(3).normal(size=clean.shape)
  out, levels = grey.denoise(noisy.astype(np.float32), level, 3)
  # What is there beyond the variance of images without noise, by its samples.
  without = np.mean(image_source.to_float(grey.sample(64)) ** 2)
  assert without == pytest.approx(SD2, rel=0.15)
  found = np.sqrt(np.mean(noisy**2, axis=(1, 2, 3)) - without)
  expected = found if level is None else np.full(8, 0.5)
  np.testing.assert_allclose(levels, expected, rtol=0.03)
  shrink = np.sqrt((SD2 + 0.002**2) / (SD2 + levels**2))[:, None, None, None]
  near(out, image_source.to_uint8(noisy * shrink))
  quantised, _ = grey.denoise(image_source.to_uint8(noisy), level, 3)
  assert quantised.shape == out.shape


def test_networks_that_cannot_invert_measure_noise_by_wavelets():
  built = model(supports_inversion=False, takes_end_time=False)
  noise = 0.3 * np.random.default_rng(3).normal(size=(8, 8, 8, 1))
  _, levels = built.denoise(noise.astype(np.float32), labels=3)
  assert levels.mean() == pytest.approx(0.3, rel=0.15)


def test_strokes(grey):
  images = photos()
  out = grey.stroke(images, 3, level=0.1, nfe=1)
  assert 0 < np.abs(out.astype(int) - images).mean() < 15


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda m: m.invert(photos().astype(np.float32), 3), "float32"),
    (lambda m: m.invert(photos(channels=3), 3), r"\[n, 8, 8, 1\]"),
    (lambda m: m.invert(photos()[:0], 3), r"\(0, 8, 8, 1\)"),
    (lambda m: m.invert(photos()), "0 to 9"),
    (lambda m: m.invert(photos(), 10), "0 to 9"),
    (lambda m: m.invert(photos(), [1, 2]), "6"),
    (lambda m: m.invert(photos(), 1.5), "label|class"),
    (lambda m: m.inpaint(photos(), ~middle() & middle(), 3), "mask"),
    (lambda m: m.inpaint(photos(), middle().astype(int), 3), "bool"),
    (lambda m: m.inpaint(photos(), middle()[:4], 3), r"\(4, 8\)"),
    (lambda m: m.super_resolve(photos(), 3, 3), "factor"),
    (lambda m: m.super_resolve(photos(), 2, 3), r"\[n, 4, 4, 1\]"),
    (lambda m: m.interpolate(photos(), photos(3), 3), "6.*3"),
    (lambda m: m.colorize(photos(), 3), "colorize"),
    (lambda m: m.stroke(photos(), 3, noise=1.0), "edit.noise"),
    (lambda m: m.sample(0), "0"),
    (lambda m: m.decode(np.zeros((2, 4, 4, 1)), 3), r"\[n, 8, 8, 1\]"),
    (lambda m: m.interpolate(photos(), photos(), 3, points=-1), "-1"),
    (lambda m: m.super_resolve(photos()[:, ::2, ::2], 2.5, 3), "factor"),
    (lambda m: m.inpaint(photos(), middle(), 3, task="restore"), "'restore'"),
    (
      lambda m: m.inpaint(photos(), middle(), 3, nfe=14, times=(3, 2, 1)),
      "edit.nfe.*edit.times",
    ),
    (lambda m: m.shift(photos(), np.zeros((4, 4, 1)), labels=3), "4, 4, 1"),
    (lambda m: m.denoise(np.zeros((2, 8, 8, 1)), 0.1, 3), "float64"),
  ],
)
def test_what_does_not_fit_is_refused(grey, call, said):
  with pytest.raises(errors.UserError, match=said):
    call(grey)


def test_networks_without_classes_take_none(colour):
  with pytest.raises(errors.UserError, match="label|class"):
    colour.sample(2, labels=1)
  with pytest.raises(errors.UserError, match="label|class"):
    colour.relabel(photos(channels=3), None, 3)
  with pytest.raises(errors.UserError, match="label|class"):
    colour.classify(photos(channels=3))
  assert colour.purify(photos(channels=3)).shape == (6, 8, 8, 3)
  assert colour.sample(2).shape == (2, 8, 8, 3)


def test_one_image_is_a_batch_of_one(grey):
  assert grey.restore(photos()[0], 3).shape == (1, 8, 8, 1)
  latent = grey.invert(photos()[0], 3)
  np.testing.assert_array_equal(
    grey.decode(latent[0], 3), grey.decode(latent, 3)
  )
  rows = grey.interpolate(photos()[0], photos()[1], 3, points=np.int64(3))
  assert rows.shape == (1, 3, 8, 8, 1)


SETTINGS = {
    "noise": lambda m, v: m.restore(photos(), 3, noise=v),
    "nfe": lambda m, v: m.restore(photos(), 3, nfe=v),
    "times": lambda m, v: m.restore(photos(), 3, times=(v,)),
    "sigma": lambda m, v: m.stroke(photos(), 3, level=v),
    "level": lambda m, v: m.denoise(photos(), v, 3),
    "invert.noise": lambda m, v: m.invert(photos(), 3, noise=v),
    "invert.nfe": lambda m, v: m.invert(photos(), 3, nfe=v),
    "seed": lambda m, v: m.sample(1, 3, v),
    "seed of an edit": lambda m, v: m.restore(photos(), 3, v),
    "count": lambda m, v: m.sample(v),
    "labels": lambda m, v: m.sample(2, labels=v),
    "sampler": lambda m, v: m.sample(1, sampler=v or 7),
    "strength": lambda m, v: m.shift(
        photos(), np.zeros((8, 8, 1)), v, 3
    ),
    "direction": lambda m, v: m.shift(
        photos(), [[[v]] * 8] * 8, 1.0, 3
    ),
    "latents": lambda m, v: m.decode([[[[v]] * 8] * 8], 3),
    "points": lambda m, v: m.interpolate(photos(), photos(), 3, points=v),
    "weights": lambda m, v: m.interpolate(photos(), photos(), 3, points=[v]),
    "factor": lambda m, v: m.super_resolve(photos()[:, ::2, ::2], v, 3),
}
GOOD = {  # Argument -> numbers that it takes.
    "seed": [0], "seed of an edit": [0], "labels": [0], "strength": [0, -1],
    "direction": [0, -1, 1e18], "latents": [0, -1, 1e18], "weights": [0],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_that_no_argument_takes(grey, name):
  values = (0, -1, math.nan, math.inf, 1e18, 10**400, "x", [[1], [2, 3]])
  for value in values:
    try:
      SETTINGS[name](grey, value)
    except errors.UserError as e:
      assert "\n" not in str(e) and value not in GOOD.get(name, ())
    else:
      assert value in GOOD.get(name, ())


def test_seeds_do_not_wrap(grey):
  for seed in (2**32, -1, 2**40):
    with pytest.raises(errors.UserError, match="seed"):
      grey.sample(1, 3, seed)
  assert (grey.sample(1, 3, 2**32 - 1) != grey.sample(1, 3, 0)).any()
  np.testing.assert_array_equal(
      grey.sample(1, 3, np.int64(7)), grey.sample(1, 3, 7)
  )


@pytest.mark.parametrize("sampler", [
    "ancestral:0", "ancestral:-1", "ancestral:1000000000", "ancestral@nan",
    "ancestral@inf", "ancestral@0", "ancestral@-1", "ancestral:1.5",
    "zigzag@nan>nan", "@", "heun:99999999999", 3, b"onestep",
])
def test_samplers_of_odd_numbers(grey, sampler):
  with pytest.raises(errors.UserError):
    grey.sample(1, 3, sampler=sampler)


def test_pil_images_in_any_mode(grey, colour):
  for model, channels, modes in (
      (grey, 1, ("L", "RGB", "P", "LA", "1")),
      (colour, 3, ("L", "RGB", "P", "RGBA", "CMYK")),
  ):
    images = photos(2, channels)
    pictures = [PIL.Image.fromarray(np.squeeze(x)) for x in images]
    np.testing.assert_array_equal(model.images(pictures), images)
    np.testing.assert_array_equal(model.images(pictures[0]), images[:1])
    for mode in modes:
      picture = pictures[0].convert(mode)
      assert model.images(picture).shape == (1, 8, 8, channels)
  turned = pictures[0].copy()
  turned.getexif()[0x0112] = 3  # Upside down.
  np.testing.assert_array_equal(model.images(turned)[0], images[0, ::-1, ::-1])
  for bad in (
      pictures[0].convert("I"), pictures[0].convert("F"),
      pictures[0].resize((9, 8)), [pictures[0], pictures[0].resize((4, 4))],
      "photo.png", None, [], {"a": 1}, [pictures[0], "b.png"],
  ):
    with pytest.raises(errors.UserError, match="images"):
      model.images(bad)


def test_float_images_of_another_range_are_refused(grey):
  clean = image_source.to_float(photos(8))
  grey.denoise(clean, 0.5, 3)
  for level in (None, 0.5):
    # The digits' mean is low, which their mean alone would not show.
    small = 255 * (clean + 1) / 2 * (np.arange(8) == 3)[:, None]
    for bad in (
        255 * (clean + 1) / 2, clean + np.float32(40), clean * np.nan, small,
    ):
      with pytest.raises(errors.UserError, match="images"):
        grey.denoise(np.float32(bad), level, 3)


def test_repr_names_the_network(grey):
  text = repr(pretrained.Model(grey.runner, "runs/a, step 3, ema_0.9"))
  assert text.startswith("Model(runs/a, step 3, ema_0.9: bcm, adm with ")
  assert "images 8x8x1, 10 classes" in text and "\n" not in text


def test_options_of_load(tmp_path):
  for options, key in (
      ({"batch_size": 0}, "batch_size"), ({"batch_size": math.nan}, "batch"),
      ({"step": -1, "source": tmp_path}, "step"),
      ({"step": 1.5, "source": tmp_path}, "step"), ({"source": 3}, "source"),
      ({"average": 3, "source": tmp_path}, "average"),
      ({"source": "gs://bucket/run"}, "source"),
      ({"source": tmp_path}, str(tmp_path)),
  ):
    with pytest.raises(errors.UserError, match=key) as caught:
      bcm_jax.load(**options)
    assert "--workdir" not in str(caught.value)


@pytest.mark.slow
def test_the_network_that_ships_makes_digits_and_inverts_them():
  digits = bcm_jax.load(batch_size=100)
  source = digits.experiment.source("test")
  batch = source.fetch(np.arange(100))
  train = digits.experiment.source("train").fetch(np.arange(1437))
  classifier = class_accuracy.DigitsSVC().fit(train["image"], train["label"])
  seen = classifier.predict(digits.sample(100, batch["label"]))
  assert np.mean(seen == batch["label"]) > 0.93
  back = digits.reconstruct(batch["image"], batch["label"])
  error = np.mean((back / 255 - batch["image"] / 255) ** 2)
  assert error < 0.01
  with pytest.raises(errors.UserError, match="step"):
    bcm_jax.load(pretrained.SHIPPED, step=3)


def test_nothing_to_load_is_said(tmp_path):
  with pytest.raises(errors.UserError, match="nothing"):
    bcm_jax.load(tmp_path / "nothing")
