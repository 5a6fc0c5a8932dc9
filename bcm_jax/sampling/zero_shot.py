"""Editing of real images, as pure functions over a flow map f(x, t, u, labels).

Two families. A map that goes both ways takes a real image to its noise,
where it is changed, and back (Li & He, BCM, 2024). A map that only makes images
makes them again and again, and the known part is put back each time (Song et
al., CM, 2023, algorithm 4). Images are [B, H, W, C] in [-1, 1]; keys [B] are of
the noise that is added. Which plans serve which task: editing/recipes.py.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.sampling import operators
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan

Keep = Callable[[jax.Array], jax.Array]
# Rounds of clipping and keeping that end a regeneration: projections in turn
# onto two convex sets, which meet.
_INTO_RANGE = 30


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """Spherical interpolation between latents, image by image.

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


# Both ways ------------------------------------------------------------------


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
  """Inverts images, changes their latents or classes, makes images again.

  With nothing changed this restores: what the small noise of the inversion
  drowned, such as artefacts of compression, comes back as in real images (Li
  & He, 2024, blind restoration), and perturbations against a classifier do not.

  Args:
    flow_map: f(x, t, u, labels).
    images: real ones.
    there: plan of the inversion.
    back: plan from its end to images.
    labels: [B] classes of the images, or None.
    keys: [B] of the added noise.
    new_labels: [B] classes to make; None is `labels`.
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
  """Mean latent of the images that have a property less that of the others.

  Args:
    latents: [B, H, W, C], of real images.
    present: [B] bool.

  Returns:
    [H, W, C]; added to a latent, it brings the property.
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
  """Fills holes by inverting and making the image again, several times.

  Li & He (2024): the hole starts as noise; each round inverts the whole image
  to a level t_k, one below the last, makes it again, and puts the known pixels
  back, feathered. The noise that the network finds for the known pixels agrees
  with them, which fresh noise would not. The paper's constants were not
  published; ours are in recipes.py.

  Args:
    flow_map: f(x, t, u, labels), both ways.
    images: what they hold in the holes does not matter.
    mask: [B, H, W, 1], 1 where a pixel is known, else 0.
    plan: of zigzags, see plan.zigzags.
    labels: [B] or None.
    keys: [B].
    fill: standard deviation of the noise in the hole.
    width: of the feathered border, pixels.

  Returns:
    [B, H, W, C]; known pixels are those of `images` to the bit.
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  # No step of the plan has this number.
  noise = process.normal_like(fold(keys, len(plan.steps)), images)
  x = operators.keep_pixels(fill * noise, images, mask)
  soft = operators.feather(mask, width)
  x = samplers.run(
      plan, flow_map, x, labels, keys,
      at_image=lambda x: operators.keep_pixels(
          jnp.clip(x, -1.0, 1.0), images, soft
      ),
  )
  return operators.keep_pixels(x, images, mask)


def latent_variance(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    sigma: jax.Array,
    sigma_max: float,
    labels: jax.Array | None = None,
) -> jax.Array:
  """Mean square [B] of what images taken to be at sigma [B] are at sigma_max.
  """
  end = jnp.full_like(sigma, sigma_max)
  latents = flow_map(images, sigma, end, labels)
  return jnp.mean(latents**2, axis=tuple(range(1, images.ndim)))


def noise_level(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    levels: sampling_plan.Range,
    grid: jax.Array,
    expected: jax.Array,
    labels: jax.Array | None = None,
    evaluations: int = 12,
) -> jax.Array:
  """Standard deviation of the white noise in images, by a two-way map.

  Jumped to sigma_max from level t, an image becomes noise of the variance that
  is expected at t if t is its level, of more if t is too low and of less if
  it is too high: t is found by bisection of ln t. An exact map expects
  sigma_max^2 + sigma_data^2 at every t; a learnt one differs at low levels, so
  what it makes of images with known noise is its measure. For Gaussian
  data exact but for the spread of an image's norm, 1 / sqrt(2 H W C).

  Args:
    flow_map: f(x, t, u, labels), both ways.
    images: [B, H, W, C] with noise.
    levels: that the map knows.
    grid: [G] ascending levels where the expectation is known.
    expected: [G], the mean `latent_variance` of images with that noise.
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


# One way --------------------------------------------------------------------


def denoise(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    sigma: jax.Array,
    levels: sampling_plan.Range,
    labels: jax.Array | None = None,
) -> jax.Array:
  """Images without the white noise of standard deviation sigma [B] in them.

  One jump f(x, sigma, sigma_min); Song et al. (2023), section 5. Levels are
  raised to sigma_min and lowered to sigma_max.
  """
  start = jnp.clip(sigma, levels.sigma_min, levels.sigma_max)
  return flow_map(images, start, jnp.full_like(start, levels.sigma_min), labels)


def class_errors(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    times: Sequence[float],
    draws: int,
    levels: sampling_plan.Range,
    num_classes: int,
    keys: jax.Array,
) -> jax.Array:
  """How badly a conditional map denoises images, told each of its classes.

  The class with the least error is the network's answer, as in the classifiers
  made of diffusion models (Li et al., Diffusion Classifier, 2023; Chen et al.,
  Robust Classification via a Single Diffusion Model, 2024). What was put into
  an image to deceive another classifier says little to it. All classes see the
  same noises; each level counts alike.

  Args:
    flow_map: f(x, t, sigma_min, labels).
    images: [B, H, W, C].
    times: levels of the noise that is added.
    draws: noises a level.
    levels: that the map knows.
    num_classes: K.
    keys: [B].

  Returns:
    [B, K]: squared errors, of each level over their mean over the classes,
    averaged over the levels.
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  total = 0.0
  for number, t in enumerate(times):
    start = jnp.full(len(images), t, images.dtype)
    end = jnp.full_like(start, levels.sigma_min)
    columns = [0.0] * num_classes
    for draw in range(number * draws, (number + 1) * draws):
      noisy = images + t * process.normal_like(fold(keys, draw), images)
      for label in range(num_classes):
        labels = jnp.full(len(images), label, jnp.int32)
        made = flow_map(noisy, start, end, labels)
        columns[label] += jnp.mean((made - images) ** 2, axis=(1, 2, 3))
    found = jnp.stack(columns, axis=1)
    total += found / found.mean(axis=1, keepdims=True)
  return total / len(times)


def regenerate(
    flow_map: samplers.FlowMap,
    images: jax.Array,
    plan: sampling_plan.Plan,
    labels: jax.Array | None,
    keys: jax.Array,
    keep: Keep | None = None,
) -> jax.Array:
  """Noises images to the plan's start and makes them again, with what is kept.

  With `keep` Song et al.'s algorithm 4: inpainting, colourisation and
  super-resolution, by the operator that puts the known part back. Without it
  their stroke-guided generation (after SDEdit; Meng et al., 2022): of the guide
  there remains what the noise leaves.

  Args:
    flow_map: f(x, t, sigma_min, labels).
    images: the known part, or the guide.
    plan: `plan.cm_multistep`, from any level.
    labels: [B] or None.
    keys: [B].
    keep: x -> x with the known part.

  Returns:
    [B, H, W, C]. What is known is put back after images are clipped to [-1, 1];
    at the end both are done in turn until the image is within the range too.
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  noise = process.normal_like(fold(keys, len(plan.steps)), images)
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
  """Standard deviation of the white noise in images, without a network.

  Donoho & Johnstone (1994): the median of the finest diagonal coefficients of
  Haar's wavelet over 0.6745. Too high where the image itself has details of
  one pixel.

  Args:
    images: [B, H, W, C], H and W even.

  Returns:
    [B].
  """
  a, b = images[:, ::2], images[:, 1::2]
  diagonal = (a[:, :, ::2] - a[:, :, 1::2] - b[:, :, ::2] + b[:, :, 1::2]) / 2
  flat = jnp.abs(diagonal).reshape(len(images), -1)
  return jnp.median(flat, axis=1) / 0.6745
