"""Reference statistics survive the disk; foreign and bad files are told."""

import hashlib
import json

from absl import logging
import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import moments
from bcm_jax.metrics import reference_stats
from bcm_jax.metrics.reference_stats import Reference


def gaussian(seed, dimension):
  rng = np.random.default_rng(seed)
  return moments.from_features(rng.normal(size=(99, dimension))).gaussian()


def whole():
  images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)
  return Reference(
    pooled=gaussian(0, 16),
    spatial=gaussian(2, 9),
    count=99,
    features_name="inception",
    features_digest="0123456789ab",
    data="caf\u00e9s, 99 images",
    images=images,
  )


def assert_same(a, b):
  for name in ("pooled", "spatial", "images"):
    x, y = getattr(a, name), getattr(b, name)
    assert (x is None) == (y is None)
    if name == "images" and x is not None:
      x, y = (x,), (y,)
    for ours, theirs in zip(x or (), y or (), strict=True):
      assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
      assert ours.tobytes() == theirs.tobytes()
  for name in ("count", "features_name", "features_digest", "data"):
    assert getattr(a, name) == getattr(b, name)


def test_what_is_read_is_what_was_written(tmp_path):
  for written in (whole(), Reference(gaussian(0, 16), count=99)):
    path = tmp_path / "new" / "reference.npz"
    reference_stats.save_reference(path, written)
    read = reference_stats.load_reference(path)
    assert_same(read, written)
    assert read.digest() == written.digest()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_files_are_those_of_adm(tmp_path):
  written = whole()
  reference_stats.save_reference(tmp_path / "a.npz", written)
  with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
    assert set(file) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "meta"}
    np.testing.assert_array_equal(file["arr_0"], written.images)
    np.testing.assert_array_equal(file["mu"], written.pooled.mean)
    np.testing.assert_array_equal(file["sigma"], written.pooled.covariance)
    np.testing.assert_array_equal(file["mu_s"], written.spatial.mean)
    np.testing.assert_array_equal(file["sigma_s"], written.spatial.covariance)


def test_files_of_others_are_read(tmp_path):
  written = whole()
  statistics = dict(mu=written.pooled.mean, sigma=written.pooled.covariance)
  spatial = dict(mu_s=written.spatial.mean, sigma_s=written.spatial.covariance)
  path = tmp_path / "a.npz"
  np.savez(path, written.images, **statistics, **spatial)  # ADM
  read = reference_stats.load_reference(str(path))
  assert_same(
    read, Reference(written.pooled, written.spatial, images=written.images)
  )
  np.savez(path, **statistics)  # EDM
  read = reference_stats.load_reference(path)
  assert_same(read, Reference(written.pooled))
  np.savez(path, written.images, np.arange(5))  # Samples with labels.
  read = reference_stats.load_reference(path)
  assert_same(read, Reference(images=written.images))
  with pytest.raises(UserError, match="images and no statistics"):
    reference_stats.check_features(read, "inception", "0123456789ab")
  np.savez(path, **{k: v.astype(np.float32) for k, v in statistics.items()})
  mean, covariance = reference_stats.load_reference(path).pooled
  assert mean.dtype == covariance.dtype == np.float64


def test_digest_is_of_mean_and_covariance_alone():
  a, (mean, covariance) = whole(), gaussian(0, 16)
  content = mean.tobytes() + covariance.tobytes()
  assert a.digest() == hashlib.sha256(content).hexdigest()[:12]
  for same in ((mean, covariance), (mean, covariance.T.copy().T)):
    assert Reference(moments.Gaussian(*same)).digest() == a.digest()
  other = moments.Gaussian(np.nextafter(mean, 9), covariance)
  assert Reference(other).digest() != a.digest()


def test_features_have_to_be_the_same():
  ours = whole()
  reference_stats.check_features(ours, "inception", "0123456789ab")
  for name, digest in (("dino", "0123456789ab"), ("inception", "ba")):
    with pytest.raises(
      UserError, match=f"inception 0123456789ab, expected {name} {digest}"
    ):
      reference_stats.check_features(ours, name, digest)
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      logging, "warning", lambda text, *values: said.append(text % values)
    )
    reference_stats.check_features(Reference(gaussian(0, 16)), "dino", "ab")
    reference_stats.check_features(ours, "inception", "0123456789ab")
  assert len(said) == 1 and "assuming dino ab" in said[0]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  reference_stats.save_reference(path, whole())
  before = path.read_bytes()

  def full_disk(file, **arrays):
    file.write(b"half")
    raise OSError("no space left on device")

  monkeypatch.setattr(np, "savez_compressed", full_disk)
  with pytest.raises(OSError, match="no space"):
    reference_stats.save_reference(path, Reference(gaussian(3, 4)))
  assert path.read_bytes() == before


def test_a_plain_name_is_written_here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  reference_stats.save_reference("a.npz", whole())
  assert_same(reference_stats.load_reference("a.npz"), whole())


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(mu=None, arr_0=None), "neither mu nor arr_0"),
    (dict(sigma=None), "one of mu and sigma"),
    (dict(mu=None), "one of mu and sigma"),
    (dict(mu_s=None), "one of mu_s and sigma_s"),
    (dict(sigma=np.eye(15)), r"expected floating point \[D\] and \[D, D\]"),
    (dict(mu_s=np.ones((9, 1))), r"mu_s and sigma_s are .*\(9, 1\)"),
    (dict(mu=np.ones(16, int)), "mu and sigma are int64"),
    (dict(sigma=np.full((16, 16), np.nan)), "has NaN"),
    (dict(arr_0=np.zeros((5, 8, 8, 3))), "arr_0 is float64"),
    (dict(arr_0=np.zeros((8, 8, 3), np.uint8)), "arr_0 is"),
    (dict(sigma=np.array([object()])), "without pickled objects"),
    (dict(meta=np.array("{")), "meta is corrupt"),
    (dict(meta=np.array("[]")), "meta is corrupt"),
    (dict(meta=np.array(json.dumps({"count": 3}))), "meta is corrupt"),
  ],
)
def test_bad_files_are_user_errors(tmp_path, changes, words):
  path = tmp_path / "a.npz"
  reference_stats.save_reference(path, whole())
  with np.load(path) as file:
    arrays = dict(file) | changes
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
  with pytest.raises(UserError, match=words):
    reference_stats.load_reference(path)


def test_files_that_are_no_npz_are_user_errors(tmp_path):
  path = tmp_path / "a.npz"
  with pytest.raises(UserError, match="does not exist"):
    reference_stats.load_reference(path)
  reference_stats.save_reference(path, whole())
  half = path.read_bytes()[:2000]
  np.save(tmp_path / "b.npy", np.ones(3))
  array = (tmp_path / "b.npy").read_bytes()
  for content in (half, array, b"", b"text", b"\x80\x04}."):
    path.write_bytes(content)
    with pytest.raises(UserError, match="a complete .npz"):
      reference_stats.load_reference(path)


def test_what_could_not_be_read_is_not_written(tmp_path):
  mean, covariance = gaussian(0, 16)
  path = tmp_path / "a.npz"
  for bad in (
    Reference(),
    Reference(moments.Gaussian(mean, covariance[:4])),
    Reference(moments.Gaussian(mean * np.inf, covariance)),
    Reference(spatial=moments.Gaussian(mean, covariance)),
    Reference(images=np.zeros((2, 8, 8, 3))),
  ):
    with pytest.raises(UserError):
      reference_stats.save_reference(path, bad)
  assert not list(tmp_path.iterdir())
