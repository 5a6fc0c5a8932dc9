"""Zero-shot editing of images, as pure functions of a flow map.

There are two families. A two-way map f(x, t, u, labels) inverts a real image
to its latent, edits the latent and decodes it (Li & He, BCM, 2024). A one-way
map regenerates the image and restores the known part after each jump (Song et
al., CM, 2023, algorithm 4). Images are [B, H, W, C] in [-1, 1]; keys [B] are
the noise keys, one per image. Each task's plan is in editing/tasks.py.
"""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan

# Luma weights of red, green and blue (ITU-R BT.601), as in CM's released code.
LUMA = (0.2989, 0.5870, 0.1140)
# Final number of alternating projections onto two convex sets: the range
# [-1, 1] and the images with the known part.
_INTO_RANGE = 30

Keep = Callable[[jax.Array], jax.Array]


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """Interpolates spherically between latents, image by image.

  sin((1-w) h) / sin h a + sin(w h) / sin h b with h the angle between the
  flattened a and b; linear where sin h < 1e-4. The function is homogeneous in
  (a, b), so latents may have any noise level.

  Args:
    a, b: latents [B, ...].
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
    inversion: sampling_plan.Plan,
    generation: sampling_plan.Plan,
    labels: jax.Array | None = None,
    keys: jax.Array | None = None,
    new_labels: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> jax.Array:
  """Inverts images, changes the latents or classes, and decodes.

  Without an edit this is blind restoration (Li & He, 2024): the inversion noise
  removes small artifacts and adversarial perturbations.

  Args:
    flow_map: f(x, t, u, labels).
    images: [B, H, W, C].
    inversion: plan from the images to latents.
    generation: plan from the latents to images.
    labels: int [B], classes of the images, or None.
    keys: [B].
    new_labels: int [B], classes of the result; None is `labels`.
    shift: [H, W, C] or [B, H, W, C], added to the latents; None adds nothing.

  Returns:
    [B, H, W, C], not clipped.
  """
  latents = samplers.run(inversion, flow_map, images, labels, keys)
  if shift is not None:
    latents = latents + shift
  new_labels = labels if new_labels is None else new_labels
  return samplers.run(generation, flow_map, latents, new_labels, keys)


def direction(latents: jax.Array, present: jax.Array) -> jax.Array:
  """Computes the latent direction of an attribute.

  The difference of the mean latents of images with and without the attribute.

  Args:
    latents: [B, H, W, C], inverted real images.
    present: bool [B], true for images with the attribute.

  Returns:
    [H, W, C], a shift of latents.
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
  to a level t_k, decreasing over rounds, decodes it, and restores the known
  pixels with a feathered border. Inverted noise is consistent with the known
  pixels, unlike fresh noise. The paper does not publish its constants; those
  used are in editing/tasks.py.

  Args:
    flow_map: two-way f(x, t, u, labels).
    images: [B, H, W, C]; pixels in the holes have no effect.
    mask: [B, H, W, 1], 1 where a pixel is known, else 0.
    plan: see sampling_plan.zigzags.
    labels: int [B], or None.
    keys: [B].
    fill: standard deviation of the initial noise in the hole.
    width: width of the feathered border, see `feather`; pixels.

  Returns:
    [B, H, W, C]; known pixels equal those of `images` exactly.
  """
  # Steps of the plan use the noise numbers 0 .. len(plan.steps) - 1.
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
  """Computes the mean square of latents.

  Args:
    flow_map: two-way f(x, t, u, labels).
    images: [B, H, W, C].
    sigma: [B], assumed noise level of the images.
    sigma_max: noise level of the latents.
    labels: int [B], or None.

  Returns:
    [B], the mean square of f(images, sigma, sigma_max).
  """
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
  """Estimates the standard deviation of white noise by a two-way map.

  A jump from level t to sigma_max gives latents of the expected variance if t
  is the noise level of the image, of larger variance if t is too low and of
  smaller variance if t is too high: bisection in ln t. An exact map has
  variance sigma_max^2 + sigma_data^2 for every t; a trained one deviates at
  low levels, so `expected` is measured on images with known noise. For
  Gaussian data the estimate is exact except for the spread of an image's norm,
  1 / sqrt(2 H W C).

  Args:
    flow_map: two-way f(x, t, u, labels).
    images: noisy images [B, H, W, C].
    levels: range of noise levels in training.
    grid: [G], increasing noise levels.
    expected: [G], mean `latent_variance` of images at these noise levels.
    labels: int [B], or None.
    evaluations: number of evaluations of the map; each halves the interval.

  Returns:
    Noise levels sigma [B], in [grid[0], grid[-1]].
  """
  logs = jnp.log(grid)
  low = jnp.full(images.shape[:1], logs[0])
  high = jnp.full(images.shape[:1], logs[-1])
  for _ in range(evaluations):
    middle = (low + high) / 2
    variance = latent_variance(
        flow_map, images, jnp.exp(middle), levels.sigma_max, labels
    )
    too_low = variance > jnp.interp(middle, logs, expected)
    low = jnp.where(too_low, middle, low)
    high = jnp.where(too_low, high, middle)
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
  """Computes the denoising error of a conditional map for each class.

  The class with the lowest error is the prediction of the diffusion classifier
  (Li et al., Diffusion Classifier, 2023; Chen et al., Robust Classification via
  a Single Diffusion Model, 2024), which transfers poorly from attacks on other
  classifiers. All classes share the same noise; levels have equal weight.

  Args:
    flow_map: f(x, t, sigma_min, labels).
    images: [B, H, W, C].
    times: noise levels at which the images are denoised.
    draws: number of noise samples per level.
    levels: range of noise levels in training.
    num_classes: number of classes K.
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

  With `keep`, this is algorithm 4 of Song et al. (2023) for inpainting,
  colorization and super-resolution; `keep` is the projection that restores the
  known part. Without `keep`, this is SDEdit (Meng et al., 2022).

  Args:
    flow_map: f(x, t, sigma_min, labels).
    images: [B, H, W, C], the known part, or the guide of SDEdit.
    plan: plan of sampling_plan.cm_multistep, from any level.
    labels: int [B], or None.
    keys: [B].
    keep: function [B, H, W, C] -> [B, H, W, C], or None.

  Returns:
    [B, H, W, C]. After each jump, images are clipped to [-1, 1] and projected
    by `keep`; at the end both alternate, so that the image with the known part
    is also in the range.
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

  Donoho & Johnstone (1994): the median absolute value of the finest diagonal
  Haar coefficients, divided by 0.6745. Details of one pixel bias it upwards.

  Args:
    images: [B, H, W, C], H and W even.

  Returns:
    Noise levels sigma [B].
  """
  a, b = images[:, ::2], images[:, 1::2]
  diagonal = (a[:, :, ::2] - a[:, :, 1::2] - b[:, :, ::2] + b[:, :, 1::2]) / 2
  flat = jnp.abs(diagonal).reshape(len(images), -1)
  return jnp.median(flat, axis=1) / 0.6745


# Projections onto the measurement-consistent set ----------------------------
#
# Each `keep_*` takes images x and known images [B, H, W, C] and returns the
# image nearest to x that has the known part: x + P (known - x) with an
# orthogonal projection P. Song et al. (CM, 2023), section 5 and algorithm 4,
# write the same with an orthogonal basis whose first vector spans the known
# part.


def keep_pixels(x: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
  """Replaces pixels of x by `known` where mask is 1.

  Exact where mask is 0 or 1; values between blend both.

  Args:
    x, known: [B, H, W, C], finite.
    mask: [B, H, W, 1] in [0, 1].
  """
  return mask * known + (1 - mask) * x


def keep_gray(x: jax.Array, known: jax.Array) -> jax.Array:
  """Replaces the luma of RGB images x by that of `known`, [B, H, W, 3]."""
  luma = jnp.asarray(LUMA, x.dtype)
  change = jnp.einsum("bhwc,c->bhw", known - x, luma) / jnp.sum(luma**2)
  return x + change[..., None] * luma


def keep_means(x: jax.Array, known: jax.Array, size: int) -> jax.Array:
  """Replaces the means of size x size blocks of x by those of `known`."""
  return x + enlarge(shrink(known - x, size), size)


def to_gray(x: jax.Array) -> jax.Array:
  """Returns the luma of images [B, H, W, 3], in three equal channels."""
  luma = jnp.asarray(LUMA, x.dtype)
  gray = jnp.einsum("bhwc,c->bhw", x, luma / luma.sum())
  return jnp.broadcast_to(gray[..., None], x.shape)


def shrink(x: jax.Array, size: int) -> jax.Array:
  """Averages size x size blocks: [B, H, W, C] -> [B, H / size, W / size, C]."""
  b, h, w, c = x.shape
  blocks = x.reshape(b, h // size, size, w // size, size, c)
  return blocks.mean(axis=(2, 4))


def enlarge(x: jax.Array, size: int) -> jax.Array:
  """Repeats pixels: [B, H, W, C] -> [B, size H, size W, C]."""
  return x.repeat(size, axis=1).repeat(size, axis=2)


def feather(mask: jax.Array, width: float) -> jax.Array:
  """Fades a mask [B, H, W, 1] to 0 towards its holes.

  A Gaussian of standard deviation `width` pixels blurs the mask; holes stay 0.
  Width 0 returns the mask unchanged.
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
