"""A checkpoint as a Python object: what it makes, inverts and recognises.

Images go in and out as uint8 [n, H, W, C] (one image [H, W, C] makes a batch of
one), latents as float32. Work is cut over all devices of the host. Class labels
are an int for all images or one an image; networks without classes take none.
Image i of a seed is the same whatever else is in the batch.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.data import image_source
from bcm_jax.diffusion import process
from bcm_jax.editing import tasks
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.sampling import zero_shot
from bcm_jax.training import rng

# How noise is measured: by so many images, at so many levels.
_MEASURED, _GRID = 64, 32

Labels = int | Sequence[int] | np.ndarray | None


class Pretrained:
  """A trained network that makes images, and inverts them.

  Attributes:
    experiment: what it was trained as.
    image_shape: (H, W, C).
    num_classes: or None.
    runner: its parameters on the devices.
  """

  def __init__(self, runner: batched_sampler.Runner):
    """Of parameters that a runner has placed on the devices."""
    self.runner = runner
    self.experiment = runner.experiment
    self.image_shape = self.experiment.image_shape
    self.num_classes = self.experiment.num_classes

  # From noise ---------------------------------------------------------------

  def sample(
      self,
      count: int = 1,
      labels: Labels = None,
      seed: int = 0,
      sampler: str | None = None,
  ) -> np.ndarray:
    """Makes images number 0 .. count - 1 of a seed.

    Args:
      count: how many.
      labels: classes; None takes all in turn.
      seed: of the noise.
      sampler: as 'onestep', 'ancestral:4' or 'ancestral@0.7'; None is what
        section sample says.

    Returns:
      uint8 [count, H, W, C].
    """
    if count < 1:
      raise errors.UserError(f"{count} images asked for; ask for 1 or more")
    if labels is None and self.num_classes is not None:
      labels = np.arange(count) % self.num_classes
    plan = planning.sampling_plan(self.experiment, sampler)
    return batched_sampler.generate(
        self.experiment, self.runner, plan, self.labels(labels, count),
        np.arange(count), seed,
    )

  def decode(
      self, latents: np.ndarray, labels: Labels = None, seed: int = 0,
      sampler: str = "onestep",
  ) -> np.ndarray:
    """Makes images of latents [n, H, W, C] at sigma_max, as `invert` gives."""
    plan = planning.sampling_plan(self.experiment, sampler)
    latents = np.asarray(latents, np.float32)
    if latents.shape == self.image_shape:
      latents = latents[None]
    if latents.shape[1:] != self.image_shape or not len(latents):
      raise errors.UserError(
          f"latents have shape {latents.shape}, expected [n, "
          f"{', '.join(map(str, self.image_shape))}]"
      )
    images = self.runner(
        plan, latents, self.labels(labels, len(latents)),
        self.keys("sample/added", seed, len(latents)),
    )
    return image_source.to_uint8(images)

  # To noise and back --------------------------------------------------------

  def invert(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      noise: float | None = None, nfe: int | None = None,
  ) -> np.ndarray:
    """Latents float32 [n, H, W, C] of images, at sigma_max.

    Args:
      images: uint8.
      labels: their classes.
      seed: of the noise added first.
      noise: its standard deviation, sigma; None is section invert's.
      nfe: network evaluations; None is section invert's.
    """
    images = self.images(images)
    plan = planning.inversion_plan(self.experiment, nfe, noise)
    return self.runner(
        plan, image_source.to_float(images), self.labels(labels, len(images)),
        self.keys("invert/added", seed, len(images)),
    )

  def reconstruct(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      noise: float | None = None, nfe: int | None = None,
  ) -> np.ndarray:
    """Inverts images and makes them again in one evaluation."""
    latents = self.invert(images, labels, seed, noise, nfe)
    return self.decode(latents, labels, seed)

  def classify(self, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Classes int32 [n]: those told which the network denoises images best.

    Takes 20 evaluations a class and image.

    Raises:
      UserError: a network without classes.
    """
    if self.num_classes is None:
      raise errors.UserError(
          "this network knows no classes, so it cannot tell any"
      )
    images = self.images(images)

    def judge(flow_map, x, labels, keys):
      del labels
      return zero_shot.class_errors(
          flow_map, x, tasks.CLASS_TIMES, tasks.CLASS_DRAWS,
          self.experiment.levels, self.num_classes, keys,
      )

    found = self.runner.apply(
        judge, image_source.to_float(images), self.labels(0, len(images)),
        self.keys("edit/classify", seed, len(images)),
    )
    return found.argmin(axis=1).astype(np.int32)

  @functools.cached_property
  def latent_variances(self) -> tuple[jnp.ndarray, jnp.ndarray]:
    """(levels [G], variance [G] of latents of images with such noise).

    Of images that the network makes, so that no data set is needed.
    """
    levels = self.experiment.levels
    images = image_source.to_float(self.sample(_MEASURED))
    labels = None
    if self.num_classes is not None:
      labels = np.arange(_MEASURED) % self.num_classes
    grid = np.geomspace(levels.sigma_min, levels.sigma_max, _GRID)

    def measure(flow_map, x, labels, keys):
      noise = process.normal_like(keys, x)
      return jnp.stack([
          zero_shot.latent_variance(
              flow_map, x + level * noise,
              jnp.full(len(x), level, jnp.float32), levels.sigma_max, labels,
          )
          for level in grid
      ], axis=1)

    variances = self.runner.apply(
        measure, images, self.labels(labels, _MEASURED),
        self.keys("edit/measure", 0, _MEASURED),
    )
    return jnp.asarray(grid, jnp.float32), jnp.asarray(variances.mean(axis=0))

  # What it is given --------------------------------------------------------

  def keys(self, stream: str, seed: int, count: int) -> jnp.ndarray:
    """Keys [count] of noise, an image's its own."""
    return rng.example_keys(seed, stream, 0, jnp.arange(count))

  def images(self, images: Any) -> np.ndarray:
    """Images as a batch, if the network takes them.

    Raises:
      UserError: another dtype or shape.
    """
    return checked(images, self.image_shape, "images")

  def labels(self, labels: Labels, count: int) -> np.ndarray | None:
    """Classes as int32 [count]; None of a network without.

    Raises:
      UserError: missing, out of range, or another number of them.
    """
    classes = self.num_classes
    if classes is None:
      if labels is not None:
        raise errors.UserError(
            "this network knows no classes; leave labels out"
        )
      return None
    if labels is None:
      raise errors.UserError(
          f"this network wants the classes of the images, 0 to {classes - 1}; "
          "give labels, one for all or one an image"
      )
    given = np.asarray(labels)
    good = np.issubdtype(given.dtype, np.integer) and given.shape in (
        (), (count,)
    )
    if not good or given.min() < 0 or given.max() >= classes:
      raise errors.UserError(
          f"labels are {given.tolist()}, expected one or {count} whole numbers "
          f"from 0 to {classes - 1}"
      )
    return np.broadcast_to(given, (count,)).astype(np.int32)


def checked(
    images, shape: tuple[int, int, int], what: str, floats: bool = False
) -> np.ndarray:
  """A batch of images, of uint8 or also float32.

  Raises:
    UserError: another dtype or shape.
  """
  images = np.asarray(images)
  if images.shape == shape:
    images = images[None]
  kinds = (np.uint8, np.float32) if floats else (np.uint8,)
  if images.dtype not in kinds or images.shape[1:] != shape or not len(images):
    kind = "uint8 or float32" if floats else "uint8"
    raise errors.UserError(
        f"{what} are {images.dtype} of shape {images.shape}, expected {kind} "
        f"[n, {', '.join(map(str, shape))}]; resize and convert them first"
    )
  return images


def known_pixels(mask, size: tuple[int, int], count: int) -> np.ndarray:
  """1 where a pixel is known: float32 [count, H, W, 1].

  Args:
    mask: bool [H, W] or [count, H, W], true in the holes.
    size: (H, W).
    count: images.

  Raises:
    UserError: another dtype or shape, or an image without a hole.
  """
  mask = np.asarray(mask)
  if mask.dtype != bool or mask.shape not in (size, (count, *size)):
    raise errors.UserError(
        f"the mask is {mask.dtype} of shape {mask.shape}, expected bool "
        f"{size} or {(count, *size)}, true in the holes"
    )
  mask = np.broadcast_to(mask, (count, *size))
  holes = mask.any(axis=(1, 2))
  if not holes.all():
    raise errors.UserError(
        f"the mask of image {int(np.argmin(holes))} has no hole; paint what is "
        "to be filled"
    )
  return (~mask).astype(np.float32)[..., None]
