"""In-memory sources, their checks, and the uint8 conversions."""

import numpy as np
import pytest

from bcm_jax.config import registry
from bcm_jax.data import image_source
from bcm_jax.errors import UserError


def _images(n=4, shape=(2, 3, 1)):
  return np.arange(n * np.prod(shape), dtype=np.uint8).reshape(n, *shape)


def test_fetch_gives_the_asked_examples_in_the_asked_order():
  labels = np.array([3, 1, 0, 2], np.int64)
  source = image_source.ArraySource(_images(), labels, 4, name="four")
  got = source.fetch(np.array([2, 0, 2]))
  np.testing.assert_array_equal(got["image"], _images()[[2, 0, 2]])
  np.testing.assert_array_equal(got["label"], [0, 3, 0])
  assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32
  assert (len(source), source.image_shape) == (4, (2, 3, 1))
  assert (source.num_classes, source.name) == (4, "four")


def test_a_source_without_labels_gives_zeros():
  source = image_source.ArraySource(_images())
  assert source.num_classes is None
  assert source.fetch(np.arange(4))["label"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_an_error_and_never_another_example(index):
  with pytest.raises(IndexError):
    image_source.ArraySource(_images()).fetch(np.array([0, index]))


@pytest.mark.parametrize("bad", [-1, 10, 255])
def test_label_error_names_example_label_and_range(bad):
  labels = np.array([0, 9, bad, bad])
  with pytest.raises(UserError) as error:
    image_source.ArraySource(_images(), labels, 10, name="mine")
  message = str(error.value)
  assert message.startswith("mine") and "\n" not in message
  for part in ("example 2", str(bad), "0 to 9", "2 of 4"):
    assert part in message


def test_label_error_names_the_id_and_not_the_position():
  with pytest.raises(UserError, match="example 71"):
    image_source.check_labels(np.array([0, 5]), np.array([7, 71]), 5, "s")


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (np.zeros((0, 8, 8, 1), np.uint8), None, "image"),
        (np.zeros((4, 8, 8, 1), np.float32), None, "float32.*uint8"),
        (np.zeros((4, 8, 8), np.uint8), None, r"\[n, H, W, C\]"),
        (_images(), np.zeros(3, np.int32), r"\(3,\)"),
        (_images(), np.zeros(4, np.float32), "float32"),
        (_images(), np.array([0, 0, -2, 0]), "label.*-2"),
    ],
)
def test_bad_arrays_are_user_errors(images, labels, words):
  with pytest.raises(UserError, match=words):
    image_source.ArraySource(images, labels)


def test_all_grey_levels_survive_the_round_trip():
  grey = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
  there = image_source.to_float(grey)
  assert there.dtype == np.float32 and there.shape == grey.shape
  np.testing.assert_array_equal(image_source.to_uint8(there), grey)


def test_to_float_is_the_affine_map_onto_minus_one_to_one():
  grey = np.arange(256, dtype=np.uint8)
  exact = grey.astype(np.float64) / 127.5 - 1
  got = image_source.to_float(grey)
  np.testing.assert_allclose(got, exact, rtol=0, atol=1.2e-7)
  assert (got[0], got[255]) == (-1, 1)


def test_to_float_refuses_what_is_not_uint8():
  with pytest.raises(UserError, match="float32.*uint8"):
    image_source.to_float(np.zeros(3, np.float32))


def test_to_uint8_floors_and_clips_in_float32():
  # (x + 1) * 127.5 = 127.99: rounding would give 128, flooring gives 127.
  x = np.array([-7.0, -1.0, 127.99 / 127.5 - 1, 0.0, 1.0, 7.0])
  assert image_source.to_uint8(x).tolist() == [0, 0, 127, 127, 255, 255]
  # In float64 this value is just below 1 and its floor would be 254.
  assert image_source.to_uint8(np.array([1 - 1e-12])).tolist() == [255]


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_to_uint8_is_the_rule_of_released_samplers(rounding):
  """EDM and EDM2: (x * 127.5 + 128).clip(0, 255).to(torch.uint8)."""
  x = np.linspace(-1.2, 1.2, 2001, dtype=np.float32)
  scaled = {"floor": (x + 1) * 127.5, "nearest": x * 127.5 + 128}[rounding]
  expected = scaled.clip(0, 255).astype(np.uint8)
  got = image_source.to_uint8(x, rounding)
  np.testing.assert_array_equal(got, expected)
  grey = np.arange(256, dtype=np.uint8)
  back = image_source.to_uint8(image_source.to_float(grey), rounding)
  np.testing.assert_array_equal(back, grey)
  inside = np.abs(x) < 0.99  # The floor is half a gray level too dark.
  bias = (got / 127.5 - 1 - x)[inside].mean() * 127.5
  assert bias == pytest.approx(-0.5 if rounding == "floor" else 0, abs=0.02)


def test_every_method_declares_its_rule():
  rules = {n: m.cls.rounding for n, m in registry.METHODS.items()}
  assert rules.pop("edm") == "nearest"
  assert set(rules.values()) == {"floor"}


def test_floats_are_the_nearest_that_come_back():
  grey = np.arange(256, dtype=np.uint8)
  exact = grey / np.float64(127.5) - 1
  assert np.abs(image_source.to_float(grey) - exact).max() < 1e-7


def test_a_fingerprint_tells_data_sets_apart_and_nothing_else():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (50, 4, 4, 3), np.uint8)
  labels = np.arange(50) % 5

  def of(images=images, labels=labels, classes=5, name="a"):
    return image_source.fingerprint(
        image_source.ArraySource(images, labels, classes, name)
    )

  assert of() == of(name="moved elsewhere")
  changed = images.copy()
  changed[0, 0, 0, 0] ^= 1
  others = [of(changed), of(labels=(labels + 1) % 5), of(classes=6),
            of(images[:49], labels[:49]),
            of(images.reshape(50, 2, 8, 3))]
  assert len({of(), *others}) == 6
