"""Zero-shot editing of images, as pure functions of a flow map.

Two families. A two-way map f(x, t, u, labels) inverts a real image to its
latent, where it is changed, and decodes it (Li & He, BCM, 2024). A one-way map
regenerates the image and puts the known part back after each jump (Song et al.,
CM, 2023, algorithm 4). Images are [B, H, W, C] in [-1, 1]; keys [B] are of the
added noise. The plans of each task are in editing/tasks.py.
"""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan

# Luma of ITU-R BT.601, as CM's released code weighs red, green and blue.
LUMA = (0.2989, 0.5870, 0.1140)
# Alternating projections onto two intersecting convex sets (range and known
# part) that end a regeneration.
_INTO_RANGE = 30

Keep = Callable[[jax.Array], jax.Array]


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """Interpolates spherically between latents, image by image.

  sin((1-w) h) / sin h a + sin(w h) / sin h b with h the angle between the
  flattened a and b; linear where sin h < 1e-4. The result scales with its
  inputs, so latents of any noise level will do.

  Args:
    a, b: [B, ...].
    weight: [B] in [0, 1]; 0 gives a, 1 gives b.

  Returns:
    [B, ...].
  """
  flat_a, flat_b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
  norms = jnp.linalg.norm(flat_a, axis=-1) * jnp.linalg.norm(flat_b, axis=-1)
  cosine = jnp.sum(flat_a * flat_b, axis=-1) / norms
  angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
  sine = jnp.sin(angle)
  near = sine < 1e-4
  safe = jnp.where(near, 1.0, sine)
  wa = jnp.where(near, 1 - weight, jnp.sin((1 - weight) * angle) / safe)
  wb = jnp.where(near, weight, jnp.sin(weight * angle) / safe)
  shape = (-1,) + (1,) * (a.ndim - 1)
  return wa.reshape(shape) * a + wb.reshape(shape) * b


# Two-way maps ---------------------------------------------------------------


def round_trip(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    there: sampling_plan.Plan,
    back: sampling_plan.Plan,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
    new_labels: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> jax.Array:
  """Inverts images, changes latents or classes, and decodes.

  Without an edit this is blind restoration (Li & He, 2024): the inversion noise
  removes small artifacts and adversarial perturbations.

  Args:
    flow_map: f(x, t, u, labels).
    images: real images.
    there: plan of the inversion.
    back: plan from its end to images.
    labels: [B] classes of the images, or None.
    keys: [B] of the added noise.
    new_labels: [B] classes of the result; None is `labels`.
    shift: [H, W, C] or [B, H, W, C], added to the latents.

  Returns:
    [B, H, W, C], not clipped.
  """
  latents = samplers.run(there, flow_map, images, labels, keys)
  if shift is not None:
    latents = latents + shift
  new_labels = labels if new_labels is None else new_labels
  return samplers.run(back, flow_map, latents, new_labels, keys)


def direction(latents: jax.Array, present: jax.Array) -> jax.Array:
  """Mean latent difference between images with and without an attribute.

  Args:
    latents: [B, H, W, C], of real images.
    present: [B] bool.

  Returns:
    [H, W, C], to be added to latents.
  """
  weight = present / present.sum() - ~present / (~present).sum()
  return jnp.einsum("b,bhwc->hwc", weight, latents)


def inpaint(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    mask: jax.Array,
    plan: sampling_plan.Plan,
    labels: jax.Array | None,
    keys: jax.Array,
    fill: float,
    width: float,
) -> jax.Array:
  """Fills holes by inverting and decoding the image several times.

  Li & He (2024): the hole starts as noise; each round inverts the whole image
  to a level t_k, decreasing over rounds, decodes it, and puts the known pixels
  back, feathered. The inverted noise of the known pixels agrees with them;
  fresh noise would not. The constants of the paper are not published; ours are
  in editing/tasks.py.

  Args:
    flow_map: f(x, t, u, labels), both ways.
    images: pixels in the holes have no effect.
    mask: [B, H, W, 1], 1 where a pixel is known, else 0.
    plan: see sampling_plan.zigzags.
    labels: [B] or None.
    keys: [B].
    fill: standard deviation of the noise in the hole.
    width: of the feathered border, pixels.

  Returns:
    [B, H, W, C]; known pixels equal those of `images` exactly.
  """
  # Steps of the plan have smaller numbers.
  noise = process.normal_like(keys, images, len(plan.steps))
  x = keep_pixels(fill * noise, images, mask)
  soft = feather(mask, width)
  x = samplers.run(
      plan, flow_map, x, labels, keys,
      at_image=lambda x: keep_pixels(jnp.clip(x, -1.0, 1.0), images, soft),
  )
  return keep_pixels(x, images, mask)


def latent_variance(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    sigma: jax.Array,
    sigma_max: float,
    labels: jax.Array | None = None,
) -> jax.Array:
  """Mean square [B] at sigma_max of images taken to be at sigma [B]."""
  end = jnp.full_like(sigma, sigma_max)
  latents = flow_map(images, sigma, end, labels)
  return jnp.mean(latents**2, axis=tuple(range(1, images.ndim)))


def noise_level(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    levels: sampling_plan.NoiseRange,
    grid: jax.Array,
    expected: jax.Array,
    labels: jax.Array | None = None,
    evaluations: int = 12,
) -> jax.Array:
  """Estimates the standard deviation of white noise in images by a two-way map.

  A jump from level t to sigma_max yields noise of the variance expected at t if
  t is the level of the image, of a larger variance if t is too low and of a
  smaller one if it is too high: bisection of ln t. An exact map has variance
  sigma_max^2 + sigma_data^2 for every t; a trained one deviates at low levels,
  so `expected` is measured on images with known noise. For Gaussian data the
  estimate is exact except for the spread of an image's norm, 1 / sqrt(2 H W C).

  Args:
    flow_map: f(x, t, u, labels), both ways.
    images: [B, H, W, C] with noise.
    levels: on which the map was trained.
    grid: [G] ascending levels of `expected`.
    expected: [G], mean `latent_variance` of images with that noise.
    labels: [B] or None.
    evaluations: of the map; each halves the interval.

  Returns:
    [B], in [grid[0], grid[-1]].
  """
  logs = jnp.log(grid)
  low = jnp.full(images.shape[:1], logs[0])
  high = jnp.full(images.shape[:1], logs[-1])
  for _ in range(evaluations):
    middle = (low + high) / 2
    variance = latent_variance(
        flow_map, images, jnp.exp(middle), levels.sigma_max, labels
    )
    more = variance > jnp.interp(middle, logs, expected)
    low, high = jnp.where(more, middle, low), jnp.where(more, high, middle)
  return jnp.exp((low + high) / 2)


# One-way maps ---------------------------------------------------------------


def denoise(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    sigma: jax.Array,
    levels: sampling_plan.NoiseRange,
    labels: jax.Array | None = None,
) -> jax.Array:
  """Removes white noise of standard deviation sigma [B] from images.

  One jump f(x, sigma, sigma_min); Song et al. (2023), section 5. Levels are
  clipped to [sigma_min, sigma_max].
  """
  start = jnp.clip(sigma, levels.sigma_min, levels.sigma_max)
  return flow_map(images, start, jnp.full_like(start, levels.sigma_min), labels)


def class_errors(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    times: Sequence[float],
    draws: int,
    levels: sampling_plan.NoiseRange,
    num_classes: int,
    keys: jax.Array,
) -> jax.Array:
  """Denoising errors of a conditional map, for each class.

  The class with the lowest error is the prediction of the diffusion classifier
  (Li et al., Diffusion Classifier, 2023; Chen et al., Robust Classification via
  a Single Diffusion Model, 2024), which transfers poorly from attacks on other
  classifiers. All classes share the same noises; levels have equal weight.

  Args:
    flow_map: f(x, t, sigma_min, labels).
    images: [B, H, W, C].
    times: levels of the noise that is added.
    draws: noises per level.
    levels: on which the map was trained.
    num_classes: K.
    keys: [B].

  Returns:
    [B, K]: squared errors, divided at each level by their mean over classes,
    averaged over levels.
  """
  total = 0.0
  for number, t in enumerate(times):
    start = jnp.full(len(images), t, images.dtype)
    end = jnp.full_like(start, levels.sigma_min)
    columns = [0.0] * num_classes
    for draw in range(number * draws, (number + 1) * draws):
      noisy = images + t * process.normal_like(keys, images, draw)
      for label in range(num_classes):
        labels = jnp.full(len(images), label, jnp.int32)
        denoised = flow_map(noisy, start, end, labels)
        columns[label] += jnp.mean((denoised - images) ** 2, axis=(1, 2, 3))
    by_class = jnp.stack(columns, axis=1)
    total += by_class / by_class.mean(axis=1, keepdims=True)
  return total / len(times)


def regenerate(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    plan: sampling_plan.Plan,
    labels: jax.Array | None,
    keys: jax.Array,
    keep: Keep | None = None,
) -> jax.Array:
  """Adds noise up to the plan's start and denoises, keeping the known part.

  With `keep`: algorithm 4 of Song et al., for inpainting, colorization and
  super-resolution, with the projection that puts the known part back. Without
  it: SDEdit (Meng et al., 2022), their stroke-guided generation.

  Args:
    flow_map: f(x, t, sigma_min, labels).
    images: the known part, or the guide.
    plan: sampling_plan.cm_multistep, from any level.
    labels: [B] or None.
    keys: [B].
    keep: x -> x with the known part.

  Returns:
    [B, H, W, C]. The known part is put back after clipping to [-1, 1]; at the
    end both alternate until the image is also within the range.
  """
  noise = process.normal_like(keys, images, len(plan.steps))
  if keep is None:
    return samplers.run(
        plan, flow_map, images + plan.start * noise, labels, keys,
        at_image=lambda x: jnp.clip(x, -1.0, 1.0),
    )
  x = samplers.run(
      plan, flow_map, images + plan.start * noise, labels, keys,
      at_image=lambda x: keep(jnp.clip(x, -1.0, 1.0)),
  )
  for _ in range(_INTO_RANGE):
    x = keep(jnp.clip(x, -1.0, 1.0))
  return x


def wavelet_noise_level(images: jax.Array) -> jax.Array:
  """Estimates the standard deviation of white noise without a network.

  Donoho & Johnstone (1994): the median of the finest diagonal coefficients of
  Haar's wavelet over 0.6745. Biased upwards where the image has details of one
  pixel.

  Args:
    images: [B, H, W, C], H and W even.

  Returns:
    [B].
  """
  a, b = images[:, ::2], images[:, 1::2]
  diagonal = (a[:, :, ::2] - a[:, :, 1::2] - b[:, :, ::2] + b[:, :, 1::2]) / 2
  flat = jnp.abs(diagonal).reshape(len(images), -1)
  return jnp.median(flat, axis=1) / 0.6745


# Projections onto the set of images that agree with a measurement -----------
#
# Each `keep_*` takes images x and known ones [B, H, W, C] in any range and
# returns the nearest image to x that has the known part: with an orthogonal
# projection P, x + P (known - x). Song et al. (CM, 2023), section 5 and
# algorithm 4, write the same with an orthogonal basis whose first vector spans
# the known part.


def keep_pixels(x: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
  """Takes pixels of `known` where mask is 1 and of x where it is 0, exactly.

  Args:
    x, known: [B, H, W, C], finite.
    mask: [B, H, W, 1] in [0, 1]; values between mix both.
  """
  return mask * known + (1 - mask) * x


def keep_grey(x: jax.Array, known: jax.Array) -> jax.Array:
  """Takes the luma of `known` [B, H, W, 3] and the chroma of x."""
  luma = jnp.asarray(LUMA, x.dtype)
  along = jnp.einsum("bhwc,c->bhw", known - x, luma) / jnp.sum(luma**2)
  return x + along[..., None] * luma


def keep_means(x: jax.Array, known: jax.Array, size: int) -> jax.Array:
  """Takes the means of size x size blocks of `known` and the details of x."""
  return x + enlarge(shrink(known - x, size), size)


def to_grey(x: jax.Array) -> jax.Array:
  """Returns the luma of images [B, H, W, 3], in three equal channels."""
  luma = jnp.asarray(LUMA, x.dtype)
  grey = jnp.einsum("bhwc,c->bhw", x, luma / luma.sum())
  return jnp.broadcast_to(grey[..., None], x.shape)


def shrink(x: jax.Array, size: int) -> jax.Array:
  """Averages blocks: [B, H, W, C] -> [B, H / size, W / size, C]."""
  b, h, w, c = x.shape
  blocks = x.reshape(b, h // size, size, w // size, size, c)
  return blocks.mean(axis=(2, 4))


def enlarge(x: jax.Array, size: int) -> jax.Array:
  """Repeats pixels to blocks: [B, H, W, C] -> [B, size H, size W, C]."""
  return x.repeat(size, axis=1).repeat(size, axis=2)


def feather(mask: jax.Array, width: float) -> jax.Array:
  """Fades a mask [B, H, W, 1] to 0 towards its holes.

  A Gaussian of standard deviation `width` pixels blurs it where it is 1; holes
  stay 0. Width 0 changes nothing.
  """
  if not width:
    return mask
  radius = math.ceil(3 * width)
  offsets = jnp.arange(-radius, radius + 1)
  kernel = jnp.exp(-0.5 * (offsets / width) ** 2)
  kernel = kernel / kernel.sum()
  blurred = mask
  for axis in (1, 2):
    pads = [(0, 0)] * mask.ndim
    pads[axis] = (radius, radius)
    padded, size = jnp.pad(blurred, pads, mode="edge"), mask.shape[axis]
    blurred = sum(
        weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
        for i, weight in enumerate(kernel)
    )
  return mask * blurred
