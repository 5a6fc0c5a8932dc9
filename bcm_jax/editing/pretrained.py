"""A trained model: sampling, inversion and zero-shot editing.

    import bcm_jax
    model = bcm_jax.load("runs/digits")
    images = model.sample(16, labels=3)
    latents = model.invert(images, labels=3)
    filled = model.inpaint(images, mask, labels=3)

Images are uint8 [n, H, W, C] in 0 .. 255; inputs may also be one image
[H, W, C], a PIL image or a list of them. Latents are float32 [n, H, W, C] at
noise level sigma_max. Work is sharded over all devices of the host. `labels`
are classes, one int for all images or one per image; None for networks without
classes. `seed` determines all noise; image i of a seed does not depend on the
rest of the batch. `**settings` of an edit are the arguments noise, level, nfe
and times of tasks.recipe. All methods raise UserError for arguments that do not
fit the network.
"""

from collections.abc import Callable, Sequence
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.diffusion import process
from bcm_jax.editing import edit_inputs
from bcm_jax.editing import tasks
from bcm_jax.export import model_folder
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.sampling import sampling_plan
from bcm_jax.sampling import zero_shot
from bcm_jax.training import rng
from bcm_jax.utils import addresses

# A small BCM of 8x8 digits, included in the package.
SHIPPED = pathlib.Path(__file__).parents[1] / "networks" / "digits"
# Standard deviation of the blend at the border of inpainted holes, pixels.
_FEATHER = 1.0
# Number of images and of noise levels in `Model.latent_variances`.
_NUM_IMAGES, _NUM_LEVELS = 64, 32

Labels = int | Sequence[int] | np.ndarray | None


class Model:
  """A trained network that samples, inverts and edits images.

  Attributes:
    experiment: experiment of the network's config.
    image_shape: (H, W, C).
    num_classes: number of classes, or None.
    runner: batched sampler with the parameters.
    source: description of the checkpoint.
  """

  def __init__(
      self, runner: batched_sampler.BatchedSampler, source: str = ""
  ):
    """Wraps a batched sampler, which holds the parameters.

    Args:
      runner: batched sampler.
      source: description of the checkpoint.
    """
    self.runner, self.source = runner, source
    self.experiment = runner.experiment
    self.image_shape = self.experiment.image_shape
    self.num_classes = self.experiment.num_classes

  def __repr__(self):
    config, shape = self.experiment.config, "x".join(map(str, self.image_shape))
    count = sum(np.size(x) for x in jax.tree.leaves(self.runner.params))
    return (
        f"Model({self.source + ': ' if self.source else ''}"
        f"{config.method.name}, {config.model.name} with {count:,} parameters, "
        f"images {shape}, {self.num_classes or 'no'} classes)"
    )

  # Generation ---------------------------------------------------------------

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
      labels: classes; None cycles through all classes.
      seed: seed of the noise.
      sampler: for example 'onestep', 'ancestral:4' or 'ancestral@0.7'; None is
        the sampler of config section `sample`.

    Returns:
      uint8 [count, H, W, C].
    """
    count = resolve.argument("count", count, "sample.num_samples")
    seed = resolve.argument("seed", seed, "sample.seed")
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
    """Generates images uint8 [n, H, W, C] from latents of `invert`."""
    plan = planning.plan_of(self.experiment, sampler)
    latents = _finite("latents", latents)
    if latents.shape == self.image_shape:
      latents = latents[None]
    if latents.shape[1:] != self.image_shape or not len(latents):
      raise errors.UserError(
          f"latents: got shape {latents.shape}, expected [n, "
          f"{', '.join(map(str, self.image_shape))}]"
      )
    return self._to_uint8(
        self._run(plan, latents, labels, "sample/added", seed)
    )

  def _to_uint8(self, images: np.ndarray) -> np.ndarray:
    return image_source.to_uint8(images, self.experiment.method.rounding)

  # Inversion ----------------------------------------------------------------

  def invert(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      noise: float | None = None, nfe: int | None = None,
  ) -> np.ndarray:
    """Inverts images to latents float32 [n, H, W, C] at sigma_max.

    Args:
      images: uint8 [n, H, W, C].
      labels: classes of the images.
      seed: seed of the initial noise.
      noise: standard deviation sigma of the initial noise; None is
        `invert.noise`.
      nfe: number of network evaluations; None is `invert.nfe`.
    """
    images = self.images(images)
    plan = planning.inversion_plan(self.experiment, nfe, noise)
    return self._run(
        plan, image_source.to_float(images), labels, "invert/added", seed
    )

  def reconstruct(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      noise: float | None = None, nfe: int | None = None,
  ) -> np.ndarray:
    """Inverts images and decodes the latents by one evaluation."""
    latents = self.invert(images, labels, seed, noise, nfe)
    return self.decode(latents, labels, seed)

  def classify(self, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Predicts classes by the lowest denoising error: int32 [n].

    The diffusion classifier, with 20 evaluations per class and image; see
    zero_shot.class_errors.

    Raises:
      UserError: the network has no classes.
    """
    if self.num_classes is None:
      raise errors.UserError(
          "classify: this network has no classes; load a conditional one"
      )

    def denoising_errors(flow_map, x, labels, keys):
      del labels
      return zero_shot.class_errors(
          flow_map, x, tasks.CLASS_TIMES, tasks.CLASS_DRAWS,
          self.experiment.levels, self.num_classes, keys,
      )

    images = image_source.to_float(self.images(images))
    class_errors = self._apply(
        denoising_errors, images, 0, "edit/classify", seed
    )
    return class_errors.argmin(axis=1).astype(np.int32)

  @functools.cached_property
  def latent_variances(self) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Calibration of `denoise`: (noise levels [G], latent variances [G]).

    Computed on samples of the network, so that no dataset is needed.
    """
    levels = self.experiment.levels
    images = image_source.to_float(self.sample(_NUM_IMAGES))
    labels = None
    if self.num_classes is not None:
      labels = np.arange(_NUM_IMAGES) % self.num_classes
    grid = np.geomspace(levels.sigma_min, levels.sigma_max, _NUM_LEVELS)

    def measure(flow_map, x, labels, keys):
      noise = process.normal_like(keys, x)
      return jnp.stack([
          zero_shot.latent_variance(
              flow_map, x + level * noise,
              jnp.full(len(x), level, jnp.float32), levels.sigma_max, labels,
          )
          for level in grid
      ], axis=1)

    variances = self._apply(measure, images, labels, "edit/measure", 0)
    return jnp.asarray(grid, jnp.float32), jnp.asarray(variances.mean(axis=0))

  # Editing ------------------------------------------------------------------

  def recipe(self, task: str, **settings: Any) -> tasks.Recipe:
    """Returns the plans and the NFE of an edit; see tasks.recipe."""
    return tasks.recipe(self.experiment, task, **settings)

  def interpolate(
      self, first: np.ndarray, second: np.ndarray, labels: Labels = None,
      second_labels: Labels = None, points: int | Sequence[float] = 9,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Interpolates spherically between the latents of pairs of images.

    Both images of a pair get the same initial noise. Each point is decoded
    with the class of the nearer image.

    Args:
      first, second: uint8 [n, H, W, C].
      labels, second_labels: classes; second_labels None is `labels`.
      points: number of points, including both ends, or weights in [0, 1].
      seed: seed of the noise.
      **settings: see `recipe`.

    Returns:
      uint8 [n, points, H, W, C].
    """
    inversion, generation = self.recipe("interpolate", **settings).plans
    first, second = self.images(first), self.images(second)
    if _array("points", points).ndim == 0:
      points = np.linspace(
          0, 1, resolve.argument("points", points, "edit.num_interpolants")
      )
    points = _finite("points", points)
    if len(first) != len(second) or points.ndim != 1 or not (
        len(points) and points.min() >= 0 and points.max() <= 1
    ):
      raise errors.UserError(
          f"interpolate: got {len(first)} and {len(second)} images and points "
          f"{points}, expected as many of each, and weights in [0, 1]"
      )
    end_labels = labels, labels if second_labels is None else second_labels
    a, b = (
        self._run(
            inversion, image_source.to_float(images), classes, "edit/added",
            seed,
        )
        for images, classes in zip((first, second), end_labels, strict=True)
    )
    columns = []
    for weight in points:
      weights = jnp.full(len(first), weight, jnp.float32)
      latents = np.asarray(
          zero_shot.slerp(jnp.asarray(a), jnp.asarray(b), weights)
      )
      images = self._run(
          generation, latents, end_labels[int(weight > 0.5)], "edit/added", seed
      )
      columns.append(self._to_uint8(images))
    return np.stack(columns, axis=1)

  def inpaint(
      self, images: np.ndarray, mask: np.ndarray, labels: Labels = None,
      seed: int = 0, task: str = "inpaint", **settings: Any,
  ) -> np.ndarray:
    """Fills holes.

    Args:
      images: uint8 [n, H, W, C]; pixels in the holes have no effect.
      mask: bool [H, W] or [n, H, W], true in the holes.
      labels: classes.
      seed: seed of the noise.
      task: 'inpaint' (by inversion; Li & He, 2024) or 'inpaint_cm' (Song et
        al., 2023, algorithm 4).
      **settings: see `recipe`.

    Returns:
      uint8 [n, H, W, C]; pixels outside of the holes are unchanged.
    """
    if task not in ("inpaint", "inpaint_cm"):
      raise errors.unknown_name("task", task, ("inpaint", "inpaint_cm"))
    (plan,) = self.recipe(task, **settings).plans
    images = self.images(images)
    known = _known_pixels(mask, self.image_shape[:2], len(images))

    def invert_and_fill(flow_map, x, labels, keys):
      return zero_shot.inpaint(
          flow_map, x["images"], x["known"], plan, labels, keys,
          self.experiment.method.sigma_data, _FEATHER,
      )

    def projection(x):
      blank = zero_shot.keep_pixels(0.0, x["images"], x["known"])
      return blank, functools.partial(
          zero_shot.keep_pixels, known=blank, mask=x["known"]
      )

    edit = invert_and_fill
    if task == "inpaint_cm":
      edit = _regeneration(plan, projection)
    filled = self._edit(edit, images, labels, seed, known=known)
    return np.where(known > 0, images, filled)

  def colorize(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Generates new colors; only the luma of the images has an effect."""
    (plan,) = self.recipe("colorize", **settings).plans

    def projection(x):
      gray = zero_shot.to_gray(x["images"])
      return gray, functools.partial(zero_shot.keep_gray, known=gray)

    edit = _regeneration(plan, projection)
    return self._edit(edit, self.images(images), labels, seed)

  def super_resolve(
      self, images: np.ndarray, factor: int = 2, labels: Labels = None,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Upsamples images [n, H / factor, W / factor, C] to [n, H, W, C]."""
    (plan,) = self.recipe("super_resolve", **settings).plans
    height, width, channels = self.image_shape
    factor = resolve.argument("factor", factor, "edit.factor")
    if height % factor or width % factor:
      raise errors.UserError(
          f"factor: got {factor}, expected a divisor of {height}x{width} "
          "pixels, at least 2"
      )
    small = (height // factor, width // factor, channels)
    images = _checked(images, small, f"images at 1/{factor} of the size")

    def projection(x):
      blocks = zero_shot.enlarge(x["images"], factor)
      return blocks, functools.partial(
          zero_shot.keep_means, known=blocks, size=factor
      )

    return self._edit(_regeneration(plan, projection), images, labels, seed)

  def denoise(
      self, images: np.ndarray, level: float | None = None,
      labels: Labels = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Removes white noise from images.

    Args:
      images: uint8 [n, H, W, C], or float32 in units where [-1, 1] is black to
        white, which only the noise exceeds.
      level: standard deviation sigma of the noise in these units; None
        estimates it per image, with the network if it supports inversion.
      labels: classes.

    Returns:
      (uint8 [n, H, W, C], noise levels [n]).
    """
    self.recipe("denoise", level=level)
    images = _checked(images, self.image_shape, "images", floats=True)
    _check_noisy(images, level)
    method, levels = self.experiment.method, self.experiment.levels
    if level is None and method.supports_inversion:
      calibration = self.latent_variances

    def clean(flow_map, x, labels, keys):
      del keys
      if level is not None:
        sigma = jnp.full(len(x["images"]), level, jnp.float32)
      elif method.supports_inversion:
        sigma = zero_shot.noise_level(
            flow_map, x["images"], levels, *calibration, labels, tasks.ESTIMATE
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
    """Removes unknown artifacts, such as those of JPEG (blind restoration)."""
    return self._round_trip("restore", images, labels, seed, settings)

  def purify(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Removes adversarial perturbations against a classifier.

    Without labels, `classify` predicts them.
    """
    if labels is None and self.num_classes is not None:
      labels = self.classify(images, seed)
    return self._round_trip("purify", images, labels, seed, settings)

  def relabel(
      self, images: np.ndarray, labels: Labels, new_labels: Labels,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Changes the class of images and keeps their latents."""
    return self._round_trip(
        "relabel", images, labels, seed, settings, new_labels=new_labels
    )

  def direction(
      self, present: np.ndarray, absent: np.ndarray, labels: Labels = None,
      absent_labels: Labels = None, seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Computes the latent direction of an attribute.

    The difference of the mean latents of positive and negative images.

    Args:
      present, absent: uint8, images with and without the attribute.
      labels, absent_labels: classes; absent_labels None is `labels`.
      seed: seed of the noise.
      **settings: see `recipe`.

    Returns:
      float32 [H, W, C], for `shift`.
    """
    inversion, _ = self.recipe("attribute", **settings).plans
    present, absent = self.images(present), self.images(absent)
    if absent_labels is None:
      absent_labels = labels
    labels = self.labels(labels, len(present))
    absent_labels = self.labels(absent_labels, len(absent))
    if labels is not None:
      labels = np.concatenate([labels, absent_labels])
    images = image_source.to_float(np.concatenate([present, absent]))
    latents = self._run(inversion, images, labels, "edit/added", seed)
    is_present = jnp.arange(len(images)) < len(present)
    return np.asarray(zero_shot.direction(jnp.asarray(latents), is_present))

  def shift(
      self, images: np.ndarray, direction: np.ndarray, strength: float = 1.0,
      labels: Labels = None, seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Adds strength * direction [H, W, C] to the latents and decodes them."""
    strength = resolve.argument("strength", strength, "edit.strength")
    shift = np.float32(strength) * _finite("direction", direction)
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
    """Generates images from sketches (SDEdit; Meng et al., 2022)."""
    (plan,) = self.recipe("stroke", **settings).plans
    edit = _regeneration(plan, lambda x: (x["images"], None))
    return self._edit(edit, self.images(images), labels, seed)

  # Inputs -------------------------------------------------------------------

  def keys(self, stream: str, seed: int, count: int) -> jnp.ndarray:
    """Returns one noise key per image, [count]."""
    seed = resolve.argument("seed", seed, "sample.seed")
    return rng.example_keys(seed, stream, 0, jnp.arange(count))

  def images(self, images: Any) -> np.ndarray:
    """Returns uint8 images as a batch [n, H, W, C].

    Raises:
      UserError: another dtype or shape.
    """
    return _checked(images, self.image_shape, "images")

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
    labels = _array("labels", labels)
    is_valid = np.issubdtype(labels.dtype, np.integer) and labels.shape in (
        (), (count,)
    )
    if not is_valid or labels.min() < 0 or labels.max() >= classes:
      raise errors.UserError(
          f"labels: got {resolve.short(labels.tolist())}, expected one or "
          f"{count} integers from 0 to {classes - 1}"
      )
    return np.broadcast_to(labels, (count,)).astype(np.int32)

  # Execution ----------------------------------------------------------------

  def _run(self, plan, x, labels: Labels, stream: str, seed: int) -> np.ndarray:
    """Executes a plan on x, float32 [n, H, W, C]."""
    return self.runner(
        plan, x, self.labels(labels, len(x)), self.keys(stream, seed, len(x))
    )

  def _apply(self, function, arrays, labels: Labels, stream: str, seed: int):
    """Applies function(flow_map, arrays, labels, keys) in batches."""
    n = len(jax.tree.leaves(arrays)[0])
    return self.runner.apply(
        function, arrays, self.labels(labels, n), self.keys(stream, seed, n)
    )

  def _round_trip(self, task, images, labels, seed, settings, new_labels=None,
                  shift=None):
    """Inverts images and generates with new classes or shifted latents."""
    plans = self.recipe(task, **settings).plans
    images, arrays = self.images(images), {}
    if new_labels is not None:
      if self.num_classes is None:
        raise errors.UserError(
            "new_labels: this network has no classes; use attribute directions"
        )
      arrays["new_labels"] = self.labels(new_labels, len(images))

    def edit(flow_map, x, labels, keys):
      return zero_shot.round_trip(
          flow_map, x["images"], *plans, labels, keys, x.get("new_labels"),
          shift,
      )

    return self._edit(edit, images, labels, seed, **arrays)

  def _edit(self, function, images, labels, seed, **arrays):
    """Applies an edit and converts its (first) result to uint8 images."""
    if images.dtype == np.uint8:
      images = image_source.to_float(images)
    result = self._apply(
        function, {"images": images, **arrays}, labels, "edit/added", seed
    )
    if isinstance(result, tuple):
      return self._to_uint8(result[0]), *result[1:]
    return self._to_uint8(result)


def load(
    source: str | os.PathLike[str] | None = None,
    average: str | None = None,
    step: int | None = None,
    batch_size: int | None = None,
) -> Model:
  """Loads a model from a checkpoint.

  Args:
    source: work directory of a run, trained or converted, or a model folder
      of bcm_jax.release.hub; None is the BCM of 8x8 digits included in this
      package.
    average: name of the moving average; None is `sample.average`.
    step: step of the checkpoint; None is the newest valid one.
    batch_size: images per batch; None is `sample.batch_size`.

  Raises:
    UserError: no readable checkpoint, or an invalid option.
  """
  if source is None:
    source = SHIPPED
  if not isinstance(source, str | os.PathLike):
    raise errors.UserError(f"source: got {source!r}, expected a path or None")
  average = resolve.argument("average", average, "sample.average")
  if step is not None:
    step = resolve.argument("step", step, "optimizer.warmup_steps")
  path = os.fspath(source)
  addresses.check_local("source", path)
  if runs.is_released(path):
    if average is not None or step is not None:
      raise errors.UserError(
          f"{path}: got average={average!r} and step={step}, expected None for"
          " a model folder, which holds one network; omit both"
      )
    experiment, params, _ = model_folder.load(path)
    which = path
  else:
    experiment = build.build(resolve.of_existing_run(path), to_train=False)
    at, name, params = runs.load_run(experiment, path, average, step)
    which = f"{path}, step {at}, {name}"
  if batch_size is None:
    batch_size = experiment.config.sample.batch_size
  size = resolve.argument("batch_size", batch_size, "sample.batch_size")
  return Model(batched_sampler.BatchedSampler(experiment, params, size), which)


def _regeneration(
    plan: sampling_plan.Plan,
    projection: Callable[[dict[str, Any]], tuple[Any, zero_shot.Keep | None]],
) -> Callable[..., Any]:
  """Returns an edit for `Model._edit` that regenerates images.

  Args:
    plan: see zero_shot.regenerate.
    projection: from the edit's arrays to (known part of the images, function
      that restores it, or None).
  """

  def edit(flow_map, x, labels, keys):
    known, keep = projection(x)
    return zero_shot.regenerate(flow_map, known, plan, labels, keys, keep)

  return edit


def _array(name: str, value: Any, channels: int | None = None) -> np.ndarray:
  """Returns numbers or PIL images as an array.

  Args:
    name: name of the argument, for errors.
    value: an array, nested lists, a PIL image or a list of them.
    channels: channels to which PIL images are converted.

  Raises:
    UserError: lists or images of several sizes, or more than 8 bits.
  """

  def pixels(item):
    if channels is None or not isinstance(item, PIL.Image.Image):
      return item
    edit_inputs.check_depth(item, name)
    return edit_inputs.pixels_of(PIL.ImageOps.exif_transpose(item), channels)

  if isinstance(value, list | tuple):
    value = [pixels(item) for item in value]
  try:
    return np.asarray(pixels(value))
  except ValueError as e:
    raise errors.UserError(
        f"{name}: got parts of several sizes ({e}), expected one array"
    ) from e


def _finite(name: str, value: Any) -> np.ndarray:
  """Returns a float32 array; raises UserError unless all are finite numbers."""
  array = _array(name, value)
  if array.dtype.kind not in "iuf" or not np.isfinite(
      array := array.astype(np.float32)
  ).all():
    raise errors.UserError(
        f"{name}: got {array.dtype} of shape {array.shape} with values that "
        "are no finite numbers, expected finite float32"
    )
  return array


def _check_noisy(images: np.ndarray, level: float | None) -> None:
  """Raises UserError for float images that are not [-1, 1] plus noise.

  Their mean and, for a given level, their values are checked up to 8 standard
  deviations, which excludes pixels in 0 .. 255.
  """
  if images.dtype == np.uint8:
    return
  axes = (1, 2, 3)
  error = 8 * images.std(axes) / np.sqrt(np.prod(images.shape[1:]))
  # Without noise below 0, values above 1 are pixels in 0 .. 255.
  good = np.isfinite(images).all() and (
      np.abs(images.mean(axes)) <= 1 + error
  ).all() and not (images.min() >= 0 and images.max() > 2)
  if not good or level is not None and np.abs(images).max() > 1 + 8 * level:
    raise errors.UserError(
        f"images: got float32 from {images.min():g} to {images.max():g}, "
        "expected [-1, 1] plus noise; convert them, or pass uint8"
    )


def _checked(
    images, shape: tuple[int, int, int], name: str, floats: bool = False
) -> np.ndarray:
  """Returns images as a batch; uint8, or also float32 with `floats`.

  Raises:
    UserError: another dtype or shape.
  """
  images = _array(name, images, shape[-1])
  if images.shape == shape:
    images = images[None]
  dtypes = (np.uint8, np.float32) if floats else (np.uint8,)
  if images.dtype not in dtypes or images.shape[1:] != shape or not len(images):
    expected = "uint8 or float32" if floats else "uint8"
    raise errors.UserError(
        f"{name}: got {images.dtype} of shape {images.shape}, expected "
        f"{expected} [n, {', '.join(map(str, shape))}]; resize and convert them"
        " first"
    )
  return images


def _known_pixels(mask, size: tuple[int, int], count: int) -> np.ndarray:
  """Returns 1 where a pixel is known, 0 in holes: float32 [count, H, W, 1].

  Args:
    mask: bool [H, W] or [count, H, W], true in the holes.
    size: (H, W).
    count: number of images.

  Raises:
    UserError: another dtype or shape, or an image without a hole.
  """
  mask = _array("mask", mask)
  if mask.dtype != bool or mask.shape not in (size, (count, *size)):
    raise errors.UserError(
        f"mask: got {mask.dtype} of shape {mask.shape}, expected bool {size} "
        f"or {(count, *size)}, true in the holes"
    )
  mask = np.broadcast_to(mask, (count, *size))
  holes = mask.any(axis=(1, 2))
  if not holes.all():
    raise errors.UserError(
        f"mask: got no hole for image {int(np.argmin(holes))}, expected at "
        "least one; mark the pixels to fill"
    )
  return (~mask).astype(np.float32)[..., None]
