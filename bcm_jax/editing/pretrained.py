"""A trained network as a Python object: sampling, inversion, editing.

    import bcm_jax
    model = bcm_jax.load("runs/digits")
    images = model.sample(16, labels=3)
    latents = model.invert(images, labels=3)
    filled = model.inpaint(images, mask, labels=3)

Images are uint8 [n, H, W, C], inputs also [H, W, C] for one image; latents are
float32. Work is sharded over all devices of the host. Class labels are one int
for all images or one per image; networks without classes take None. Image i of
a seed does not depend on the rest of the batch. Every edit takes `labels`
(classes of the images), `seed` (of the noise that it adds) and the settings of
tasks.recipe: noise, level, nfe, times.
"""

from collections.abc import Sequence
import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.diffusion import process
from bcm_jax.editing import tasks
from bcm_jax.export import model_folder
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.sampling import zero_shot
from bcm_jax.training import rng

# A small BCM of 8x8 digits that is part of the package.
SHIPPED = pathlib.Path(__file__).parents[1] / "networks" / "digits"
# Standard deviation of the blend at the border of inpainted holes, pixels.
_FEATHER = 1.0
# `Model.latent_variances`: number of images and of noise levels.
_MEASURED, _GRID = 64, 32

Labels = int | Sequence[int] | np.ndarray | None


class Model:
  """A trained network that samples, inverts and edits.

  Attributes:
    experiment: the experiment of its config.
    image_shape: (H, W, C).
    num_classes: or None.
    runner: batched sampler with its parameters.
  """

  def __init__(self, runner: batched_sampler.BatchedSampler):
    """Wraps a batched sampler, which holds the parameters."""
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
    """Samples images number 0 .. count - 1 of a seed.

    Args:
      count: number of images.
      labels: classes; None cycles through all.
      seed: of the noise.
      sampler: as 'onestep', 'ancestral:4' or 'ancestral@0.7'; None is the
        sampler of config section `sample`.

    Returns:
      uint8 [count, H, W, C].
    """
    if count < 1:
      raise errors.UserError(f"count: got {count}, expected 1 or more")
    if labels is None and self.num_classes is not None:
      labels = np.arange(count) % self.num_classes
    plan = planning.plan_of(self.experiment, sampler)
    return batched_sampler.generate(
        self.experiment, self.runner, plan, self.labels(labels, count),
        np.arange(count), seed,
    )

  def decode(
      self, latents: np.ndarray, labels: Labels = None, seed: int = 0,
      sampler: str = "onestep",
  ) -> np.ndarray:
    """Decodes latents [n, H, W, C] at sigma_max, as `invert` returns them."""
    plan = planning.plan_of(self.experiment, sampler)
    latents = np.asarray(latents, np.float32)
    if latents.shape == self.image_shape:
      latents = latents[None]
    if latents.shape[1:] != self.image_shape or not len(latents):
      raise errors.UserError(
          f"latents: got shape {latents.shape}, expected [n, "
          f"{', '.join(map(str, self.image_shape))}]"
      )
    images = self.runner(
        plan, latents, self.labels(labels, len(latents)),
        self.keys("sample/added", seed, len(latents)),
    )
    return image_source.to_uint8(images)

  # Inversion ----------------------------------------------------------------

  def invert(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      noise: float | None = None, nfe: int | None = None,
  ) -> np.ndarray:
    """Returns the latents float32 [n, H, W, C] of images, at sigma_max.

    Args:
      images: uint8.
      labels: classes of the images.
      seed: of the noise added first.
      noise: standard deviation of that noise, sigma; None is `invert.noise`.
      nfe: network evaluations; None is `invert.nfe`.
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
    """Inverts images and decodes the latents in one evaluation."""
    latents = self.invert(images, labels, seed, noise, nfe)
    return self.decode(latents, labels, seed)

  def classify(self, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Diffusion-classifier prediction, int32 [n].

    The label with the lowest denoising error, by 20 evaluations per class and
    image; see zero_shot.class_errors.

    Raises:
      UserError: the network has no classes.
    """
    if self.num_classes is None:
      raise errors.UserError(
          "classify: this network has no classes; load a conditional one"
      )
    images = self.images(images)

    def denoising_errors(flow_map, x, labels, keys):
      del labels
      return zero_shot.class_errors(
          flow_map, x, tasks.CLASS_TIMES, tasks.CLASS_DRAWS,
          self.experiment.levels, self.num_classes, keys,
      )

    by_class = self.runner.apply(
        denoising_errors, image_source.to_float(images),
        self.labels(0, len(images)),
        self.keys("edit/classify", seed, len(images)),
    )
    return by_class.argmin(axis=1).astype(np.int32)

  @functools.cached_property
  def latent_variances(self) -> tuple[jnp.ndarray, jnp.ndarray]:
    """(levels [G], variance [G] of latents of images with that noise).

    Measured on samples of the network, so that no dataset is needed.
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

  # Editing -----------------------------------------------------------------

  def recipe(self, task: str, **settings: Any) -> tasks.Recipe:
    """Returns the plans and the NFE of an edit; see tasks.recipe."""
    return tasks.recipe(self.experiment, task, **settings)

  def interpolate(
      self, first: np.ndarray, second: np.ndarray, labels: Labels = None,
      second_labels: Labels = None, points: int | Sequence[float] = 9,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Interpolates between pairs of images, through their latents.

    Both ends get the same small noise; a point takes the class of the nearer
    end.

    Args:
      first, second: uint8.
      labels, second_labels: classes; second_labels None is `labels`.
      points: number of points, both ends included, or weights from 0 to 1.
      seed: of the noise.
      **settings: see `recipe`.

    Returns:
      uint8 [n, points, H, W, C].
    """
    there, back = self.recipe("interpolate", **settings).plans
    first, second = self.images(first), self.images(second)
    number = isinstance(points, (int, np.integer))
    if len(first) != len(second) or (
        points < 2 if number else not len(points)
    ):
      raise errors.UserError(
          f"interpolate: got {len(first)} and {len(second)} images and "
          f"{points} points, expected as many of each and at least 2 points"
      )
    weights = np.linspace(0, 1, points) if number else points
    count = len(first)
    keys = self.keys("edit/added", seed, count)
    ends = [
        (self.runner(there, image_source.to_float(images), of, keys), of)
        for images, of in (
            (first, self.labels(labels, count)),
            (second, self.labels(
                labels if second_labels is None else second_labels, count
            )),
        )
    ]
    columns = []
    for weight in weights:
      mixed = zero_shot.slerp(
          jnp.asarray(ends[0][0]), jnp.asarray(ends[1][0]),
          jnp.full(count, weight, jnp.float32),
      )
      images = self.runner(
          back, np.asarray(mixed), ends[int(weight > 0.5)][1], keys
      )
      columns.append(image_source.to_uint8(images))
    return np.stack(columns, axis=1)

  def inpaint(
      self, images: np.ndarray, mask: np.ndarray, labels: Labels = None,
      seed: int = 0, task: str = "inpaint", **settings: Any,
  ) -> np.ndarray:
    """Fills holes.

    Args:
      images: uint8; pixels in the holes have no effect.
      mask: bool [H, W] or [n, H, W], true in the holes.
      labels: classes.
      seed: of the noise.
      task: 'inpaint' (inverts) or 'inpaint_cm' (CM, algorithm 4).
      **settings: see `recipe`.

    Returns:
      uint8 [n, H, W, C]; pixels outside of the holes are unchanged.
    """
    if task not in ("inpaint", "inpaint_cm"):
      raise errors.unknown_name("task", task, ("inpaint", "inpaint_cm"))
    (plan,) = self.recipe(task, **settings).plans
    images = self.images(images)
    known = known_pixels(
        mask, self.image_shape[:2], len(images)
    )
    sigma_data = self.experiment.method.sigma_data

    def fill(flow_map, x, labels, keys):
      if task == "inpaint":
        return zero_shot.inpaint(
            flow_map, x["images"], x["known"], plan, labels, keys,
            sigma_data, _FEATHER,
        )
      blank = zero_shot.keep_pixels(0.0, x["images"], x["known"])
      keep = functools.partial(
          zero_shot.keep_pixels, known=blank, mask=x["known"]
      )
      return zero_shot.regenerate(flow_map, blank, plan, labels, keys, keep)

    filled = self._edit(fill, images, labels, seed, known=known)
    return np.where(known > 0, images, filled)

  def colorize(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Generates new colors; of the images only the luma is used."""
    (plan,) = self.recipe("colorize", **settings).plans

    def colorize(flow_map, x, labels, keys):
      grey = zero_shot.to_grey(x["images"])
      keep = functools.partial(zero_shot.keep_grey, known=grey)
      return zero_shot.regenerate(flow_map, grey, plan, labels, keys, keep)

    return self._edit(colorize, self.images(images), labels, seed)

  def super_resolve(
      self, images: np.ndarray, factor: int = 2, labels: Labels = None,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Upsamples images [n, H / factor, W / factor, C] to [n, H, W, C]."""
    (plan,) = self.recipe("super_resolve", **settings).plans
    height, width, channels = self.image_shape
    whole = isinstance(factor, (int, np.integer)) and factor >= 2
    if not whole or height % factor or width % factor:
      raise errors.UserError(
          f"factor: got {factor}, expected a divisor of {height}x{width} "
          "pixels, at least 2"
      )
    small = (height // factor, width // factor, channels)
    images = checked(images, small, f"images at 1/{factor} of the size")

    def upsample(flow_map, x, labels, keys):
      blocks = zero_shot.enlarge(x["images"], factor)
      keep = functools.partial(
          zero_shot.keep_means, known=blocks, size=factor
      )
      return zero_shot.regenerate(flow_map, blocks, plan, labels, keys, keep)

    return self._edit(upsample, images, labels, seed)

  def denoise(
      self, images: np.ndarray, level: float | None = None,
      labels: Labels = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Removes white noise from images.

    Args:
      images: uint8, or float32 where [-1, 1] is black to white and noise may
        exceed the range.
      level: standard deviation of the noise in those units, sigma; None
        estimates it per image, by the network if it supports inversion.
      labels: classes.

    Returns:
      (uint8 [n, H, W, C], levels [n]).
    """
    self.recipe("denoise", level=level)
    images = checked(images, self.image_shape, "images", floats=True)
    method, levels = self.experiment.method, self.experiment.levels
    if level is None and method.supports_inversion:
      measure = self.latent_variances

    def clean(flow_map, x, labels, keys):
      del keys
      if level is not None:
        sigma = jnp.full(len(x["images"]), level, jnp.float32)
      elif method.supports_inversion:
        sigma = zero_shot.noise_level(
            flow_map, x["images"], levels, *measure, labels, tasks.ESTIMATE
        )
      else:
        sigma = zero_shot.wavelet_noise_level(x["images"])
      return zero_shot.denoise(
          flow_map, x["images"], sigma, levels, labels
      ), sigma

    return self._edit(clean, images, labels, 0)

  def restore(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Removes artifacts, such as JPEG's, of unknown kind (blind restoration).
    """
    return self._round_trip("restore", images, labels, seed, settings)

  def purify(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Removes adversarial perturbations against a classifier.

    Labels None are those that `classify` predicts.
    """
    if labels is None and self.num_classes is not None:
      labels = self.classify(images, seed)
    return self._round_trip("purify", images, labels, seed, settings)

  def relabel(
      self, images: np.ndarray, labels: Labels, new_labels: Labels,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Changes the class, keeping the latent."""
    return self._round_trip(
        "relabel", images, labels, seed, settings, new_labels=new_labels
    )

  def direction(
      self, present: np.ndarray, absent: np.ndarray, labels: Labels = None,
      absent_labels: Labels = None, seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Mean latent difference between positive and negative images.

    Args:
      present, absent: uint8, images with and without the attribute.
      labels, absent_labels: classes; absent_labels None is `labels`.
      seed: of the noise.
      **settings: see `recipe`.

    Returns:
      float32 [H, W, C], for `shift`.
    """
    there, _ = self.recipe("attribute", **settings).plans
    groups = [self.images(present), self.images(absent)]
    of = [labels, labels if absent_labels is None else absent_labels]
    counts = [len(group) for group in groups]
    both = [
        self.labels(label, count)
        for label, count in zip(of, counts, strict=True)
    ]
    latents = self.runner(
        there, image_source.to_float(np.concatenate(groups)),
        None if both[0] is None else np.concatenate(both),
        self.keys("edit/added", seed, sum(counts)),
    )
    has = np.arange(sum(counts)) < counts[0]
    return np.asarray(
        zero_shot.direction(jnp.asarray(latents), jnp.asarray(has))
    )

  def shift(
      self, images: np.ndarray, direction: np.ndarray, strength: float = 1.0,
      labels: Labels = None, seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Moves the latents of images along a `direction` and decodes them."""
    shift = strength * np.asarray(direction, np.float32)
    if shift.shape != self.image_shape:
      raise errors.UserError(
          f"direction: got shape {shift.shape}, expected {self.image_shape}"
      )
    return self._round_trip(
        "attribute", images, labels, seed, settings, shift=shift
    )

  def stroke(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """SDEdit of sketches: adds noise, then denoises."""
    (plan,) = self.recipe("stroke", **settings).plans
    return self._edit(
        lambda flow_map, x, labels, keys: zero_shot.regenerate(
            flow_map, x["images"], plan, labels, keys
        ),
        self.images(images), labels, seed,
    )

  # Inputs ------------------------------------------------------------------

  def keys(self, stream: str, seed: int, count: int) -> jnp.ndarray:
    """Returns one noise key per image, [count]."""
    return rng.example_keys(seed, stream, 0, jnp.arange(count))

  def images(self, images: Any) -> np.ndarray:
    """Returns uint8 images as a batch.

    Raises:
      UserError: another dtype or shape.
    """
    return checked(images, self.image_shape, "images")

  def labels(self, labels: Labels, count: int) -> np.ndarray | None:
    """Returns classes as int32 [count]; None if the network has no classes.

    Raises:
      UserError: missing, out of range, or not one per image.
    """
    classes = self.num_classes
    if classes is None:
      if labels is not None:
        raise errors.UserError(
            "labels: this network has no classes; omit labels"
        )
      return None
    if labels is None:
      raise errors.UserError(
          f"labels: got None, expected classes from 0 to {classes - 1}; give "
          "one for all images or one per image"
      )
    labels = np.asarray(labels)
    good = np.issubdtype(labels.dtype, np.integer) and labels.shape in (
        (), (count,)
    )
    if not good or labels.min() < 0 or labels.max() >= classes:
      raise errors.UserError(
          f"labels: got {labels.tolist()}, expected one or {count} integers "
          f"from 0 to {classes - 1}"
      )
    return np.broadcast_to(labels, (count,)).astype(np.int32)

  def _round_trip(self, task, images, labels, seed, settings, new_labels=None,
                  shift=None):
    there, back = self.recipe(task, **settings).plans
    images = self.images(images)
    more = {}
    if new_labels is not None and self.num_classes is not None:
      more["new_labels"] = self.labels(new_labels, len(images))
    elif new_labels is not None:
      raise errors.UserError(
          "new_labels: this network has no classes to change to; use attribute "
          "directions"
      )

    def edit(flow_map, x, labels, keys):
      return zero_shot.round_trip(
          flow_map, x["images"], there, back, labels, keys,
          x.get("new_labels"), shift,
      )

    return self._edit(edit, images, labels, seed, **more)

  def _edit(self, function, images, labels, seed, **more):
    """Runs an edit in batches and converts the images to uint8."""
    if images.dtype == np.uint8:
      images = image_source.to_float(images)
    arrays = {"images": images, **more}
    result = self.runner.apply(
        function, arrays, self.labels(labels, len(images)),
        self.keys("edit/added", seed, len(images)),
    )
    if isinstance(result, tuple):
      return image_source.to_uint8(result[0]), *result[1:]
    return image_source.to_uint8(result)


def load(
    source: str | os.PathLike[str] | None = None,
    average: str | None = None,
    step: int | None = None,
    batch_size: int | None = None,
) -> Model:
  """Opens a run's checkpoint.

  Args:
    source: work directory of a run, trained or converted, or a folder as
      bcm_jax.export.hub packs and pulls it; None is the small BCM of 8x8
      digits that is part of this package.
    average: moving average; None is `sample.average`.
    step: of the checkpoint; None is the newest good one.
    batch_size: images at a time; None is `sample.batch_size`.

  Raises:
    UserError: no readable checkpoint.
  """
  if batch_size is not None and batch_size < 1:
    raise errors.UserError(f"batch_size: got {batch_size}, expected at least 1")
  place = os.fspath(SHIPPED if source is None else source)
  if runs.is_released(place):
    if average is not None or step is not None:
      raise errors.UserError(
          f"{place} holds only one network; omit average and step"
      )
    experiment, params, _ = model_folder.load(place)
  else:
    experiment = build.build(resolve.of_existing_run(place), to_train=False)
    _, _, params = runs.load_run(experiment, place, average, step)
  size = batch_size or experiment.config.sample.batch_size
  return Model(batched_sampler.BatchedSampler(experiment, params, size))


def checked(
    images, shape: tuple[int, int, int], what: str, floats: bool = False
) -> np.ndarray:
  """Returns images as a batch; uint8, or also float32 with `floats`.

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
        f"{what}: got {images.dtype} of shape {images.shape}, expected {kind} "
        f"[n, {', '.join(map(str, shape))}]; resize and convert them first"
    )
  return images


def known_pixels(mask, size: tuple[int, int], count: int) -> np.ndarray:
  """Returns 1 where a pixel is known, 0 in holes: float32 [count, H, W, 1].

  Args:
    mask: bool [H, W] or [count, H, W], true in the holes.
    size: (H, W).
    count: number of images.

  Raises:
    UserError: another dtype or shape, or an image without a hole.
  """
  mask = np.asarray(mask)
  if mask.dtype != bool or mask.shape not in (size, (count, *size)):
    raise errors.UserError(
        f"mask: got {mask.dtype} of shape {mask.shape}, expected bool {size} "
        f"or {(count, *size)}, true in the holes"
    )
  mask = np.broadcast_to(mask, (count, *size))
  holes = mask.any(axis=(1, 2))
  if not holes.all():
    raise errors.UserError(
        f"mask: image {int(np.argmin(holes))} has no hole; paint the pixels to "
        "fill"
    )
  return (~mask).astype(np.float32)[..., None]
