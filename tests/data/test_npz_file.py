"""Images in .npz files."""

import numpy as np
import pytest

from bcm_jax.data import npz_file
from bcm_jax.data import resizing
from bcm_jax.errors import UserError
from tests.data import pictures

N = 5


def _images(n=N, **shape):
  return np.stack([pictures.noise(k, **shape) for k in range(n)])


def _all(source):
  return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", npz_file.LABEL_KEYS)
@pytest.mark.parametrize("images", npz_file.IMAGE_KEYS)
def test_arrays_come_back_under_every_name(tmp_path, save, images, labels):
  file = str(tmp_path / "x.npz")
  save(file, **{images: _images(height=6), labels: np.array([0, 3, 1, 1, 0])})
  found = npz_file.data_set(file)
  assert found.image_shape == (6, 8, 3) and found.num_classes == 4
  assert found.splits == ("train",)
  got = _all(found.open("train", None))
  np.testing.assert_array_equal(got["image"], _images(height=6))
  assert got["label"].tolist() == [0, 3, 1, 1, 0]


def test_without_labels(tmp_path):
  file = str(tmp_path / "x.npz")
  np.savez(file, _images())
  found = npz_file.data_set(file)
  assert found.num_classes is None
  source = found.open("train", None)
  assert source.num_classes is None
  assert _all(source)["label"].tolist() == [0] * N


def test_splits_share_the_classes_of_train(tmp_path):
  np.savez(tmp_path / "train.npz", _images(), np.arange(N))
  np.savez(tmp_path / "val.npz", _images(2), np.array([1, 2]))
  found = npz_file.data_set(str(tmp_path))
  assert found.splits == ("train", "test")
  assert found.open("test", None).num_classes == N
  np.testing.assert_array_equal(
      _all(found.open("test", None))["image"], _images(2)
  )


@pytest.mark.parametrize("crop", ["adm", "edm"])
def test_a_size_resizes(tmp_path, crop):
  images = _images(height=20, width=17, channels=1)
  np.savez(tmp_path / "x.npz", images, np.arange(N))
  found = npz_file.data_set(str(tmp_path / "x.npz"), 8, crop)
  assert found.image_shape == (8, 8, 1)
  got = _all(found.open("train", None))
  for image, pixels in zip(got["image"], images, strict=True):
    np.testing.assert_array_equal(image, resizing.BY_NAME[crop](pixels, 8))
  assert got["label"].tolist() == list(range(N))


# Bad input.


@pytest.mark.parametrize(
    "arrays, words",
    [
        (
            dict(arr_0=_images().transpose(0, 3, 1, 2)),
            r"\(5, 3, 8, 8\)",
        ),
        (dict(pictures=_images()), "pictures"),
        (dict(), "images"),
        (dict(arr_0=_images()[..., 0]), r"\[n, H, W, C\]"),
        (dict(arr_0=_images() / 255), "float64.*uint8"),
        (dict(arr_0=_images(), arr_1=np.arange(4)), "label"),
        (dict(arr_0=_images(), arr_1=np.ones(N)), "float64"),
        (dict(arr_0=_images(), arr_1=np.arange(N) - 1), "-1"),
        (dict(arr_0=_images()[:0]), "image"),
    ],
)
def test_arrays_that_cannot_be(tmp_path, arrays, words):
  file = str(tmp_path / "x.npz")
  np.savez(file, **arrays)
  with pytest.raises(UserError, match=words) as error:
    npz_file.data_set(file).open("train", None)
  assert file in str(error.value)


def test_objects_are_never_unpickled(tmp_path):
  file = str(tmp_path / "x.npz")
  np.savez(file, arr_0=_images(), arr_1=np.array([{}] * N))
  with pytest.raises(UserError, match="x.npz"):
    npz_file.data_set(file)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_cut_short(tmp_path, share):
  file = tmp_path / "x.npz"
  np.savez(file, _images())
  file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
  with pytest.raises(UserError, match="x.npz"):
    npz_file.data_set(str(file))


def test_a_changed_pixel_is_found(tmp_path):
  file = tmp_path / "x.npz"
  np.savez(file, _images())
  content = bytearray(file.read_bytes())
  content[400] ^= 1
  file.write_bytes(content)
  with pytest.raises(UserError, match="x.npz.*CRC"):
    npz_file.data_set(str(file)).open("train", None)


def test_a_single_array_is_no_npz(tmp_path):
  np.save(tmp_path / "x.npy", _images())
  with pytest.raises(UserError, match="x.npy"):
    npz_file.data_set(str(tmp_path / "x.npy"))


def test_a_folder_without_files(tmp_path):
  with pytest.raises(UserError, match="train.npz"):
    npz_file.data_set(str(tmp_path))


def test_splits_must_agree(tmp_path):
  np.savez(tmp_path / "train.npz", _images(), np.arange(N))
  np.savez(tmp_path / "test.npz", _images())
  with pytest.raises(UserError, match="label"):
    npz_file.data_set(str(tmp_path)).open("test", None)
  np.savez(tmp_path / "test.npz", _images(height=9), np.arange(N))
  with pytest.raises(UserError, match=r"\(9, 8, 3\).*\(8, 8, 3\)"):
    npz_file.data_set(str(tmp_path)).open("test", None)
  with pytest.raises(UserError, match="'test'"):
    file = str(tmp_path / "train.npz")
    npz_file.data_set(file).open("test", None)
