"""Editing on Gaussian data, where every task has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import process
from bcm_jax.sampling import sampling_plan
from bcm_jax.sampling import zero_shot
from tests import gaussian

LEVELS = sampling_plan.NoiseRange()
SD2 = gaussian.SD**2
B, SHAPE = 6, (8, 8, 3)


def factor(t, u):
  """The exact flow map of N(0, SD^2) from level t to u."""
  return np.sqrt((SD2 + u**2) / (SD2 + t**2))


def real(n=B, seed=0):
  key = jax.random.key(seed)
  return gaussian.SD * jax.random.normal(key, (n, *SHAPE))


def keys(n=B):
  return jax.random.split(jax.random.key(7), n)


def noise(step, x):
  """What step number `step` of a plan draws."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  return process.normal_like(fold(keys(len(x)), step), x)


def known(x):
  mask = np.ones((len(x), 8, 8, 1), np.float32)
  mask[:, 2:6, 2:6] = 0
  return jnp.asarray(mask)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def pair(n=4):
  rng = np.random.default_rng(0)
  return 80 * rng.standard_normal((2, n, 4, 4, 2)).astype(np.float32)


def norms(x):
  return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=-1)


def test_ends():
  a, b = pair()
  np.testing.assert_allclose(zero_shot.slerp(a, b, jnp.zeros(4)), a, rtol=1e-6)
  np.testing.assert_allclose(
      zero_shot.slerp(a, b, jnp.ones(4)), b, rtol=1e-5, atol=1e-4
  )


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_equal_norms_are_kept_and_angles_divided(weight):
  a, b = pair()
  b = b * (norms(a) / norms(b))[:, None, None, None].astype(np.float32)
  out = zero_shot.slerp(a, b, jnp.full(4, weight))
  np.testing.assert_allclose(norms(out), norms(a), rtol=1e-5)
  # A straight line would cut the corner.
  assert (norms((a + b) / 2) < 0.9 * norms(a)).all()

  def angle(p, q):
    p, q = (np.asarray(v, np.float64).reshape(4, -1) for v in (p, q))
    return np.arccos((p * q).sum(-1) / norms(p) / norms(q))

  np.testing.assert_allclose(angle(a, out), weight * angle(a, b), rtol=1e-4)


def test_each_image_has_its_own_weight():
  a, b = pair()
  weights = jnp.array([0.0, 0.3, 0.6, 1.0])
  out = zero_shot.slerp(a, b, weights)
  for i in range(4):
    np.testing.assert_allclose(
        out[i], zero_shot.slerp(a[i:i + 1], b[i:i + 1], weights[i:i + 1])[0],
        rtol=1e-5, atol=1e-4,
    )


def test_result_scales_with_its_inputs_and_is_symmetric():
  a, b = pair()
  w = jnp.full(4, 0.3)
  out = zero_shot.slerp(a, b, w)
  np.testing.assert_allclose(
      zero_shot.slerp(a / 80, b / 80, w), out / 80, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
      zero_shot.slerp(b, a, 1 - w), out, rtol=1e-4, atol=1e-4
  )


def test_parallel_latents_are_interpolated_linearly():
  a, _ = pair()
  w = jnp.full(4, 0.25)
  for factor in (1.0, 3.0, 1.0001):
    out = zero_shot.slerp(a, factor * a, w)
    np.testing.assert_allclose(
        out, (0.75 + 0.25 * factor) * a, rtol=1e-5, atol=1e-4
    )


THERE = sampling_plan.inversion(0.1, (), LEVELS)
BACK = sampling_plan.ancestral((), LEVELS)


@pytest.mark.slow
def test_a_round_trip_shrinks_the_noise_that_it_adds():
  x = real()
  out = zero_shot.round_trip(
      gaussian.flow_map, x, THERE, BACK, keys=keys()
  )
  close(out, factor(0.1, 0.002) * (x + 0.1 * noise(0, x)))


def test_latents_are_shifted_and_classes_changed_between_there_and_back():
  x, shift = real(), 3.0 * jnp.ones(SHAPE)
  seen = []

  def flow_map(x, t, u, labels):
    seen.append(labels)
    return gaussian.flow_map(x, t, u)

  out = zero_shot.round_trip(
      flow_map, x, THERE, BACK, "old", keys(), "new", shift
  )
  there = factor(0.1, 80) * (x + 0.1 * noise(0, x))
  close(out, factor(80, 0.002) * (there + shift))
  assert seen == ["old", "new"]
  seen.clear()
  zero_shot.round_trip(flow_map, x, THERE, BACK, "old", keys())
  assert seen == ["old", "old"]


@pytest.mark.slow
def test_direction_is_the_difference_of_means():
  latents, present = real(5), jnp.array([True, False, False, True, False])
  out = zero_shot.direction(latents, present)
  close(out, latents[present].mean(0) - latents[~present].mean(0))


def rounds(x, pairs, width):
  """Inpainting of N(0, SD^2) images, written down step by step."""
  mask = known(x)
  soft = zero_shot.feather(mask, width)
  h = mask * x + (1 - mask) * 0.5 * noise(3 * len(pairs), x)
  for k, (e, _) in enumerate(pairs):
    h = factor(e, 0.002) * (h + e * noise(3 * k, x))
    h = soft * x + (1 - soft) * jnp.clip(h, -1, 1)
  return mask * x + (1 - mask) * h


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.0, 1.0])
def test_inpainting(width):
  x, pairs = real(), [(0.1, 80.0), (0.2, 5.0), (0.3, 0.6)]
  plan = sampling_plan.zigzags(pairs, LEVELS)
  assert plan.nfe == 6 and plan.start == plan.end == 0.002
  fill = functools.partial(
    zero_shot.inpaint,
    gaussian.flow_map,
    mask=known(x),
    plan=plan,
    labels=None,
    keys=keys(),
    fill=0.5,
    width=width,
  )
  out = fill(x)
  close(out, rounds(x, pairs, width))
  hole = np.broadcast_to(known(x) == 0, x.shape)
  np.testing.assert_array_equal(np.asarray(out)[~hole], np.asarray(x)[~hole])
  # What the holes held is not looked at.
  np.testing.assert_array_equal(fill(jnp.where(hole, 0.9, x)), out)


@pytest.mark.slow
def test_data_are_made_again_from_the_noise_in_a_hole():
  """Enough rounds forget what the hole was filled with but for its level."""
  x = real(200)
  plan = sampling_plan.zigzags([(0.5, 80.0)] * 6, LEVELS)
  out = zero_shot.inpaint(
    gaussian.flow_map, x, known(x), plan, None, keys(200), 0.01, 0.0
  )
  # v <- min(v, clipped) at the fixed point: clipping at 2 SD takes 7.4%.
  variance = float(out[:, 2:6, 2:6].var())
  shrink = factor(0.5, 0.002) ** 2
  expected = 0.01**2
  for _ in range(6):
    expected = (expected + 0.25) * shrink
  assert 0.85 * expected < variance < expected


OPERATORS = {
  "free": None,
  "pixels": lambda x: functools.partial(
    zero_shot.keep_pixels, known=x, mask=known(x)
  ),
  "grey": lambda x: functools.partial(zero_shot.keep_gray, known=x),
  "means": lambda x: functools.partial(zero_shot.keep_means, known=x, size=2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_regeneration_puts_the_known_part_back_every_time(name):
  x = real()
  keep = None if name == "free" else OPERATORS[name](x)
  plan = sampling_plan.cm_multistep((5.0, 0.7), LEVELS, start=20.0)
  out = zero_shot.regenerate(gaussian.flow_map, x, plan, None, keys(), keep)
  keep = keep or (lambda v: v)
  low = LEVELS.sigma_min
  h = x + 20 * noise(5, x)
  for i, t in enumerate((20.0, 5.0, 0.7)):
    if i:
      h = h + np.sqrt(t**2 - low**2) * noise(2 * i - 1, x)
    h = keep(jnp.clip(factor(t, low) * h, -1, 1))
  if name in ("grey", "means"):
    # What left the range, with all that it is bound to, was brought into it.
    shape, axes = {"grey": (x.shape, 3), "means": ((B, 4, 2, 4, 2, 3), (2, 4))}[
      name
    ]
    inside = (abs(h) <= 1).reshape(shape).all(axis=axes, keepdims=True)
    inside = np.broadcast_to(inside, shape).reshape(x.shape)
    assert 0.3 < inside.mean() < 0.99
    plain = zero_shot.to_gray(x) if name == "grey" else keep(0 * x)
    possible = abs(plain) <= 0.9  # White and black have no colour, no detail.
    assert np.abs(out)[possible & ~inside].max() < 1.02
    close(keep(out), out)
    out, h = out[inside], h[inside]
  close(out, h)


@pytest.mark.slow
def test_strokes_keep_more_of_the_guide_the_lower_they_start():
  x = real(50)
  kept = []
  for start in (0.2, 1.0, 5.0):
    plan = sampling_plan.cm_multistep((), LEVELS, start=start)
    out = zero_shot.regenerate(gaussian.flow_map, x, plan, None, keys(50))
    kept.append(float(jnp.corrcoef(out.ravel(), x.ravel())[0, 1]))
  expected = [gaussian.SD / np.sqrt(SD2 + t**2) for t in (0.2, 1.0, 5.0)]
  np.testing.assert_allclose(kept, expected, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.05, 0.7, 6.0])
def test_noise_is_measured_and_taken_out(sigma):
  x = real() + sigma * noise(0, real())
  grid = jnp.geomspace(0.002, 80.0, 3)
  one = jnp.ones(3)
  expected = jnp.stack(
    [
      zero_shot.latent_variance(
        gaussian.flow_map,
        jnp.ones((1, *SHAPE)) * np.sqrt(SD2 + level**2),
        level[None],
        80.0,
      )[0]
      for level in grid
    ]
  )
  np.testing.assert_allclose(expected, (SD2 + 6400) * one, rtol=1e-4)
  found = zero_shot.noise_level(
    gaussian.flow_map, x, LEVELS, grid, expected, evaluations=20
  )
  # The closed form: the level at which N(0, SD^2) has the image's variance.
  variance = np.mean(np.square(np.asarray(x, np.float64)), axis=(1, 2, 3))
  expected = np.sqrt(np.maximum(variance - SD2, 0.002**2))
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
  levels = jnp.linspace(0.001, 100.0, B)
  out = zero_shot.denoise(gaussian.flow_map, x, levels, LEVELS)
  clipped = np.clip(levels, 0.002, 80.0)[:, None, None, None]
  close(out, factor(clipped, 0.002) * x)


@pytest.mark.slow
def test_noise_of_smooth_images_is_measured_without_a_network():
  ramp = jnp.linspace(-1, 1, 64)
  smooth = jnp.broadcast_to(
    (ramp[:, None] * ramp)[None, :, :, None], (4, 64, 64, 1)
  )
  for sigma in (0.05, 0.4):
    noisy = smooth + sigma * jax.random.normal(jax.random.key(0), smooth.shape)
    found = zero_shot.wavelet_noise_level(noisy)
    np.testing.assert_allclose(found, sigma, rtol=0.1)


@pytest.mark.slow
def test_correlated_pixels_are_filled_by_their_neighbours():
  """Of N(0, C) both ways of filling come near to E[hole | known]."""
  place = np.stack(np.meshgrid(range(8), range(8)), -1).reshape(-1, 2)
  distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
  covariance = 0.1 * np.exp(-((distance / 3) ** 2)) + 1e-3 * np.eye(64)
  values, vectors = np.linalg.eigh(covariance)
  basis = jnp.asarray(vectors, jnp.float32)

  def flow_map(x, t, u, labels=None):
    del labels
    flat = x.reshape(len(x), 64) @ basis
    scale = jnp.sqrt((values + u[:, None] ** 2) / (values + t[:, None] ** 2))
    return ((flat * scale) @ basis.T).reshape(x.shape)

  n = 100
  rng = np.random.default_rng(0)
  flat = rng.standard_normal((n, 64)) * np.sqrt(values) @ vectors.T
  x = jnp.asarray(flat.reshape(n, 8, 8, 1), jnp.float32)
  hole = np.asarray(known(x)[0]).ravel() == 0
  gain = covariance[np.ix_(hole, ~hole)] @ np.linalg.inv(
    covariance[np.ix_(~hole, ~hole)]
  )
  mean = flat[:, ~hole] @ gain.T
  times, noises = np.geomspace(80, 0.05, 24), np.geomspace(1, 0.02, 24)
  inverted = zero_shot.inpaint(
    flow_map,
    x,
    known(x),
    sampling_plan.zigzags([(e, 10 * e) for e in noises], LEVELS),
    None,
    keys(n),
    0.3,
    0.0,
  )
  replaced = zero_shot.regenerate(
    flow_map,
    x * known(x),
    sampling_plan.cm_multistep(tuple(times[1:]), LEVELS),
    None,
    keys(n),
    functools.partial(zero_shot.keep_pixels, known=x, mask=known(x)),
  )
  spread = np.square(mean).mean()
  errors = [
    np.square(np.asarray(out).reshape(n, 64)[:, hole] - mean).mean() / spread
    for out in (inverted, replaced)
  ]
  # 1 is what a grey hole would have, and 0.06 samples of the posterior.
  assert max(errors) < 0.45


@pytest.mark.slow
def test_the_class_that_denoises_best_has_the_nearest_mean():
  means = jnp.array([-0.6, -0.1, 0.2, 0.7])

  def conditional(x, t, u, labels):
    mean = means[labels][:, None, None, None]
    return mean + gaussian.phi(x - mean, t, u)

  true = np.array([3, 0, 2, 1, 1, 3])
  x = means[true][:, None, None, None] + real()
  times = (0.3, 1.0)
  found = zero_shot.class_errors(conditional, x, times, 40, LEVELS, 4, keys())
  assert found.shape == (B, 4)
  np.testing.assert_allclose(found.mean(axis=1), 1.0, rtol=1e-5)
  # E (f - x)^2 = (1 - a)^2 mean (x - m)^2 + a^2 t^2, a = phi's factor.
  away = np.mean((x[..., None] - means) ** 2, axis=(1, 2, 3))
  expected = []
  for t in times:
    a = factor(t, LEVELS.sigma_min)
    error = (1 - a) ** 2 * away + a**2 * t**2
    expected.append(error / error.mean(axis=1, keepdims=True))
  np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=0.02)
  np.testing.assert_array_equal(found.argmin(axis=1), away.argmin(axis=1))
