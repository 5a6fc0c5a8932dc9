"""Precision and recall: reference numbers, brute force, properties."""

import pathlib

import numpy as np
import pytest

from bcm_jax.errors import UserError
from bcm_jax.metrics import nearest_neighbors
from bcm_jax.metrics import precision_recall as pr
from tests.parity import metrics

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def precision_recall(real, fake, k=3, block_size=nearest_neighbors.BLOCK_SIZE):
  return pr.prdc(real, fake, k, k, block_size)[:2]


def brute_force(real, fake, k):
  """The definition, point by point."""

  def distance(a, b):
    return np.sqrt(np.sum((a[:, None] - b[None, :]) ** 2, axis=-1))

  def radii(points):
    # Column 0 of a sorted row is the point itself.
    return np.sort(distance(points, points), axis=1)[:, k]

  between = distance(real, fake)
  precision = np.mean((between <= radii(real)[:, None]).any(axis=0))
  recall = np.mean((between <= radii(fake)[None, :]).any(axis=1))
  return precision, recall


def clouds(seed, real_count=150, fake_count=110, dim=6, shift=0.3, scale=0.8):
  rng = np.random.default_rng(seed)
  real = rng.normal(size=(real_count, dim))
  return real, shift + scale * rng.normal(size=(fake_count, dim))


# "dup" holds exact copies, whose distances tie with radii: the reference
# counts a tie as inside, which the rounding of a matrix product can break.
@pytest.mark.parametrize("case", ["a", "b", "dup"])
def test_reproduces_the_adm_evaluator(case):
  golden = np.load(GOLDENS / "precision_recall.npz", allow_pickle=False)
  real, fake = golden[f"in/{case}_real"], golden[f"in/{case}_gen"]
  precision, recall = precision_recall(real, fake, k=3)
  assert precision == float(golden[f"out/{case}_precision"])
  assert recall == float(golden[f"out/{case}_recall"])
  # The reference stores squared radii in float32; a squared distance of 0
  # comes out of the product form as 1e-15 or so.
  for points, name in ((real, "real"), (fake, "gen")):
    np.testing.assert_allclose(
      metrics.manifold_radii(points, k=3) ** 2,
      golden[f"out/{case}_radii_{name}"][:, 0],
      rtol=2e-7,
      atol=1e-12,
    )


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_definition(seed, k):
  real, fake = clouds(seed)
  assert precision_recall(real, fake, k) == brute_force(real, fake, k)


@pytest.mark.parametrize("block_size", [2, 37, 110, 150])
def test_blocks_change_nothing(block_size):
  real, fake = clouds(0)
  whole = precision_recall(real, fake)
  assert 0.2 < min(whole) and max(whole) < 1.0, whole
  assert precision_recall(real, fake, block_size=block_size) == whole
  np.testing.assert_allclose(
    metrics.manifold_radii(real, 3, block_size),
    metrics.manifold_radii(real, 3),
    rtol=1e-12,
  )


def test_same_set_is_perfect():
  real, _ = clouds(1)
  assert precision_recall(real, real.copy()) == (1.0, 1.0)


def test_sets_far_apart_share_nothing():
  real, fake = clouds(1)
  assert precision_recall(real, fake + 100.0) == (0.0, 0.0)


def test_dropping_a_mode_costs_recall_only():
  rng = np.random.default_rng(2)
  centres = np.repeat([[0.0, 0.0], [50.0, 0.0]], 200, axis=0)
  real = centres + rng.normal(size=(400, 2))
  both = centres + rng.normal(size=(400, 2))
  precision, recall = precision_recall(real, both)
  precision_one, recall_one = precision_recall(real, both[:200])
  assert min(precision, recall, precision_one) > 0.9
  assert recall_one == pytest.approx(0.5 * recall, abs=0.03)


def test_junk_costs_precision_only():
  real, _ = clouds(3)
  junk = 1000.0 * (1.0 + np.arange(50.0))[:, None] ** 2 * np.ones((1, 6))
  # The junk is one-sided, so no junk ball reaches back to the real points.
  precision, recall = precision_recall(real, np.concatenate([real, junk]))
  assert precision == pytest.approx(150 / 200)
  assert recall == 1.0


def test_swapping_the_sets_swaps_the_two():
  real, fake = clouds(4)
  precision, recall = precision_recall(real, fake)
  assert precision != recall
  assert precision_recall(fake, real) == (recall, precision)


def test_unchanged_by_shift_scale_and_rotation():
  real, fake = clouds(5)
  rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
  moved = [7.0 + 0.01 * points @ rotation for points in (real, fake)]
  assert precision_recall(*moved) == precision_recall(real, fake)


def test_radius_is_the_kth_other_point():
  line = np.array([[0.0], [1.0], [3.0], [7.0]])
  np.testing.assert_allclose(metrics.manifold_radii(line, 1), [1, 1, 2, 4])
  np.testing.assert_allclose(metrics.manifold_radii(line, 3), [7, 6, 4, 7])


def test_copies_and_ties_count_as_inside_in_many_dimensions():
  # All points repeated k + 1 times: every radius is 0, only copies are inside.
  rng = np.random.default_rng(6)
  points = 20.0 * rng.random((30, 2048)).astype(np.float32)
  real = np.repeat(points, 4, axis=0)
  fake = np.concatenate([points, points + 0.01])
  fake = np.repeat(fake, 4, axis=0)[rng.permutation(240)]
  assert precision_recall(real, fake, 3, 17) == (0.5, 1.0)


def test_images_are_flattened():
  real, fake = clouds(0, dim=12)
  images = [points.reshape(-1, 2, 2, 3) for points in (real, fake)]
  assert precision_recall(*images) == precision_recall(real, fake)


def test_integer_pixels_do_not_wrap_around():
  rng = np.random.default_rng(7)
  real = rng.integers(0, 256, (80, 5), dtype=np.uint8)
  fake = rng.integers(0, 256, (70, 5), dtype=np.uint8)
  expected = brute_force(real.astype(float), fake.astype(float), 3)
  assert precision_recall(real, fake) == expected


@pytest.mark.parametrize(
  "real, fake, k, words",
  [
    (np.zeros((9, 2)), np.zeros((9, 3)), 3, "got 2 and 3 values per row"),
    (np.zeros((9, 2)), np.zeros((3, 2)), 3, "1 <= k < 3"),
    (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k: got 0"),
    (np.zeros((9, 2)), np.full((9, 2), np.nan), 3, "fake: got NaN"),
    (np.zeros((9, 2)), np.zeros((9, 2), np.uint8), 3, "same scale"),
    (np.zeros(9), np.zeros(9), 3, r"real: got shape \(9,\)"),
    (np.zeros((0, 2)), np.zeros((9, 2)), 3, r"real: got shape \(0, 2\)"),
  ],
)
def test_bad_input_is_a_user_error(real, fake, k, words):
  with pytest.raises(UserError, match=words):
    precision_recall(real, fake, k)
