"""A checkpoint as a Python object: editing of real images.

    import bcm_jax
    model = bcm_jax.load("runs/digits")
    images = model.sample(16, labels=3)
    latents = model.invert(images, labels=3)
    filled = model.inpaint(images, mask, labels=3)

Every edit takes `labels` (classes of the images), `seed` (of the noise that it
adds) and the settings of recipes.recipe: noise, level, nfe, times.
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
from bcm_jax.data import image_source
from bcm_jax.editing import pretrained
from bcm_jax.editing import tasks
from bcm_jax.editing.pretrained import Labels
from bcm_jax.export import model_folder
from bcm_jax.export import packing
from bcm_jax.generate import batched_sampler
from bcm_jax.sampling import operators
from bcm_jax.sampling import zero_shot

# A network that is there wherever the package is.
SHIPPED = pathlib.Path(__file__).parents[1] / "networks" / "digits"
# Where the blend of inpainting ends, pixels.
_FEATHER = 1.0


class Model(pretrained.Pretrained):
  """A trained network and what can be done with it."""

  def recipe(self, task: str, **settings: Any) -> tasks.Recipe:
    """What an edit will do: plans and NFE; see recipes.recipe.
    """
    return tasks.recipe(self.experiment, task, **settings)

  def interpolate(
      self, first: np.ndarray, second: np.ndarray, labels: Labels = None,
      second_labels: Labels = None, points: int | Sequence[float] = 9,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Ways between pairs of images, through their latents.

    Both ends get the same small noise; a point takes the class of the nearer
    end.

    Args:
      first, second: uint8.
      labels, second_labels: their classes; second_labels None is `labels`.
      points: how many, both ends included, or where: weights from 0 to 1.
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
          f"interpolation got {len(first)} and {len(second)} images and "
          f"{points} points; give as many of each and at least 2 points"
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
      images: uint8; what is in the holes does not matter.
      mask: bool [H, W] or [n, H, W], true in the holes.
      labels: classes.
      seed: of the noise.
      task: 'inpaint' (inverts) or 'inpaint_cm' (puts known pixels back).
      **settings: see `recipe`.

    Returns:
      uint8 [n, H, W, C]; pixels outside of the holes are as they were.
    """
    if task not in ("inpaint", "inpaint_cm"):
      raise errors.unknown_name("task", task, ("inpaint", "inpaint_cm"))
    (plan,) = self.recipe(task, **settings).plans
    images = self.images(images)
    known = pretrained.known_pixels(
        mask, self.image_shape[:2], len(images)
    )
    sigma_data = self.experiment.method.sigma_data

    def fill(flow_map, x, labels, keys):
      if task == "inpaint":
        return zero_shot.inpaint(
            flow_map, x["images"], x["known"], plan, labels, keys,
            sigma_data, _FEATHER,
        )
      blank = operators.keep_pixels(0.0, x["images"], x["known"])
      keep = functools.partial(
          operators.keep_pixels, known=blank, mask=x["known"]
      )
      return zero_shot.regenerate(flow_map, blank, plan, labels, keys, keep)

    filled = self._edit(fill, images, labels, seed, known=known)
    return np.where(known > 0, images, filled)

  def colorize(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Gives images other colours: of theirs only the luma is looked at."""
    (plan,) = self.recipe("colorize", **settings).plans

    def colour(flow_map, x, labels, keys):
      grey = operators.to_grey(x["images"])
      keep = functools.partial(operators.keep_grey, known=grey)
      return zero_shot.regenerate(flow_map, grey, plan, labels, keys, keep)

    return self._edit(colour, self.images(images), labels, seed)

  def super_resolve(
      self, images: np.ndarray, factor: int = 2, labels: Labels = None,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Gives images [n, H / factor, W / factor, C] details: [n, H, W, C]."""
    (plan,) = self.recipe("super_resolve", **settings).plans
    height, width, channels = self.image_shape
    whole = isinstance(factor, (int, np.integer)) and factor >= 2
    if not whole or height % factor or width % factor:
      raise errors.UserError(
          f"factor={factor} does not divide {height}x{width} pixels; give one "
          "that does, at least 2"
      )
    small = (height // factor, width // factor, channels)
    images = pretrained.checked(images, small, f"images a {factor}th the size")

    def detail(flow_map, x, labels, keys):
      blocks = operators.enlarge(x["images"], factor)
      keep = functools.partial(
          operators.keep_means, known=blocks, size=factor
      )
      return zero_shot.regenerate(flow_map, blocks, plan, labels, keys, keep)

    return self._edit(detail, images, labels, seed)

  def denoise(
      self, images: np.ndarray, level: float | None = None,
      labels: Labels = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Takes white noise out of images.

    Args:
      images: uint8, or float32 in units where [-1, 1] is black to white, which
        noise leaves.
      level: standard deviation of the noise in those units, sigma; None
        measures it an image, by the network if it inverts.
      labels: classes.

    Returns:
      (uint8 [n, H, W, C], levels [n]).
    """
    self.recipe("denoise", level=level)
    images = pretrained.checked(images, self.image_shape, "images", floats=True)
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
    """Takes artefacts, as of JPEG, out of images, whatever they are."""
    return self._round_trip("restore", images, labels, seed, settings)

  def purify(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Takes out what was put into images to deceive a classifier.

    Without labels they are those of `classify`, not of the one deceived.
    """
    if labels is None and self.num_classes is not None:
      labels = self.classify(images, seed)
    return self._round_trip("purify", images, labels, seed, settings)

  def relabel(
      self, images: np.ndarray, labels: Labels, new_labels: Labels,
      seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """Makes of images such of other classes, of the same latents."""
    return self._round_trip(
        "relabel", images, labels, seed, settings, new_labels=new_labels
    )

  def direction(
      self, present: np.ndarray, absent: np.ndarray, labels: Labels = None,
      absent_labels: Labels = None, seed: int = 0, **settings: Any,
  ) -> np.ndarray:
    """What latents of images with a property have and others have not.

    Args:
      present, absent: uint8, images with and without it.
      labels, absent_labels: their classes; absent_labels None is `labels`.
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
    """Moves images' latents along a `direction`, and makes images of them."""
    way = strength * np.asarray(direction, np.float32)
    if way.shape != self.image_shape:
      raise errors.UserError(
          f"the direction has shape {way.shape}, expected {self.image_shape}"
      )
    return self._round_trip(
        "attribute", images, labels, seed, settings, shift=way
    )

  def stroke(
      self, images: np.ndarray, labels: Labels = None, seed: int = 0,
      **settings: Any,
  ) -> np.ndarray:
    """Makes images of sketches; of them there stays what the noise leaves."""
    (plan,) = self.recipe("stroke", **settings).plans
    return self._edit(
        lambda flow_map, x, labels, keys: zero_shot.regenerate(
            flow_map, x["images"], plan, labels, keys
        ),
        self.images(images), labels, seed,
    )

  # Inside -------------------------------------------------------------------

  def _round_trip(self, task, images, labels, seed, settings, new_labels=None,
                  shift=None):
    there, back = self.recipe(task, **settings).plans
    images = self.images(images)
    more = {}
    if new_labels is not None and self.num_classes is not None:
      more["new_labels"] = self.labels(new_labels, len(images))
    elif new_labels is not None:
      raise errors.UserError(
          "this network knows no classes to change to; use attribute directions"
      )

    def edit(flow_map, x, labels, keys):
      return zero_shot.round_trip(
          flow_map, x["images"], there, back, labels, keys,
          x.get("new_labels"), shift,
      )

    return self._edit(edit, images, labels, seed, **more)

  def _edit(self, function, images, labels, seed, **more):
    """Runs an edit; images of its result come back as uint8."""
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
      digits that comes with this package.
    average: moving average, see section sample.
    step: of the checkpoint; None is the newest good one.
    batch_size: images at a time; None is section sample's.

  Raises:
    UserError: nothing there that can be read.
  """
  if batch_size is not None and batch_size < 1:
    raise errors.UserError(f"batch_size={batch_size} must be at least 1")
  place = os.fspath(SHIPPED if source is None else source)
  if model_folder.is_released(place):
    if average is not None or step is not None:
      raise errors.UserError(
          f"{place} holds one network alone; leave average and step out"
      )
    experiment, params, _ = packing.load(place)
  else:
    experiment = build.build(runs.config_of(place), to_train=False)
    _, _, params = runs.load_run(experiment, place, average, step)
  size = batch_size or experiment.config.sample.batch_size
  return Model(batched_sampler.Runner(experiment, params, size))
