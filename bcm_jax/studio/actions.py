"""What the studio's buttons do: files and numbers in, pictures and words out.

No word of the browser here. Pictures are enlarged, so that 8x8 pixels can be
seen and painted; uploads are cropped and resized to fit.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
import time
from typing import Any

import numpy as np

from bcm_jax import errors
from bcm_jax.data import image_source
from bcm_jax.editing import edit_inputs
from bcm_jax.editing import pretrained
from bcm_jax.generate import planning
from bcm_jax.metrics import image_grid
from bcm_jax.metrics import reconstruction

# Pixels a side of a picture in the browser.
CANVAS = 256
# Of an upload, before it is decoded: 24 megapixels are a large photograph.
_MOST_PIXELS = 24_000_000
# In place of a class: every class in turn.
ALL = -1
# In place of a class: that which the network finds.
FIND = -2
# Images that are made at a time.
MOST_IMAGES = 25
# Share of a pixel that must be painted to make it part of a hole.
_PAINTED = 0.25

Told = tuple[np.ndarray, str]


class Studio:
  """A model and what the studio shows of it.

  Attributes:
    model: the network, several images at a time.
    editor: the same, one image at a time.
    scale: pixels of a picture a pixel of an image.
    samplers: that it can be sampled with.
    classes: (name, label) of the classes, () for a network without.
  """

  def __init__(self, model: pretrained.Model):
    self.model = model
    self.editor = pretrained.Model(model.runner.resized(1))
    self.scale = max(1, CANVAS // max(model.image_shape[:2]))
    method = model.experiment.method
    if method.is_denoiser:
      self.samplers = ("heun", "ddim")
    elif method.takes_end_time:
      self.samplers = ("onestep", "ancestral", "cm_multistep")
    else:
      self.samplers = ("onestep", "cm_multistep")
    self.classes = tuple(
        (str(k), k) for k in range(model.num_classes or 0)
    )

  # Pictures -----------------------------------------------------------------

  def enlarge(self, image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, C] as the browser shows it: [sH, sW, 3]."""
    large = image.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
    return np.broadcast_to(large, (*large.shape[:2], 3)).copy()

  def read(self, path: str | None) -> np.ndarray:
    """An uploaded file as uint8 [1, H, W, C].

    A picture of ours comes back as the image that it shows.

    Raises:
      UserError: nothing uploaded, no image, or one too large.
    """
    if path is None:
      raise errors.UserError("there is no image yet; upload or drop one")
    with open(path, "rb") as f:
      return self._image(f.read(), os.path.basename(path))[None]

  def _image(self, content: bytes, name: str) -> np.ndarray:
    """A file as uint8 [H, W, C]; of ours every pixel is a block of one grey."""
    height, width, channels = self.model.image_shape
    picture = edit_inputs.open_picture(content, name, _MOST_PIXELS)
    pixels = edit_inputs.pixels_of(picture, channels)
    if pixels.shape[:2] == (height * self.scale, width * self.scale):
      small = pixels[:: self.scale, :: self.scale]
      blocks = small.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
      if (blocks == pixels).all():
        return small
    return edit_inputs.fitted(pixels, height, width)

  def example(self, index: int) -> np.ndarray | None:
    """A test image, enlarged; None where the data are not at hand."""
    experiment = self.model.experiment
    try:
      source = experiment.source("test")
      index %= len(source)
      return self.enlarge(source.fetch(np.array([index]))["image"][0])
    except (errors.UserError, OSError):
      return None

  def example_label(self, index: int) -> int | None:
    """Its class."""
    if not self.classes:
      return None
    source = self.model.experiment.source("test")
    return int(source.fetch(np.array([index % len(source)]))["label"][0])

  # Buttons ------------------------------------------------------------------

  def generate(
      self, label: int | None, seed: float, count: float, sampler: str,
      nfe: float,
  ) -> Told:
    """Makes images; (a grid, what was done)."""
    count = int(count)
    if not 1 <= count <= MOST_IMAGES:
      raise errors.UserError(
          f"{count} images were asked for; ask for 1 to {MOST_IMAGES}"
      )
    text = sampler
    if sampler != "onestep":
      text += f":{_fits(sampler, nfe)}"
    plan = planning.plan_of(self.model.experiment, text)
    images, seconds = _timed(
        self.model.sample, count, self._label(label), _seed(seed), text
    )
    columns = math.ceil(math.sqrt(count))
    grid = image_grid.image_grid(
        images, columns, scale=max(1, 2 * self.scale // (columns + 1))
    )
    return np.broadcast_to(grid, (*grid.shape[:2], 3)), _told(
        plan.nfe, seconds, plan
    )

  def reconstruct(
      self, path: str | None, label: int | None, noise: float, nfe: float,
      seed: float,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """(image as the network sees it, its latent, reconstruction, words)."""
    image = self.read(path)
    (label, note), seed = self._class_of(label, image), _seed(seed)
    nfe = int(nfe)
    there = planning.inversion_plan(self.model.experiment, nfe, noise)
    latents, seconds = _timed(
        self.editor.invert, image, label, seed, noise, nfe
    )
    images, more = _timed(self.editor.decode, latents, label, seed)
    sigma_max = self.model.experiment.levels.sigma_max
    latent = image_source.to_uint8(latents / (3 * sigma_max))
    mse = float(reconstruction.per_pixel_mse(image, images)[0])
    words = _told(
        nfe + 1, seconds + more, f"{there}\nonestep: 1 NFE, back",
        f"error {mse:.4f} on [0, 1], PSNR {float(reconstruction.psnr(mse)):.1f}"
        " dB", note,
    )
    return (*map(self.enlarge, (image[0], latent[0], images[0])), words)

  def interpolate(
      self, first: str | None, second: str | None, label: int | None,
      second_label: int | None, weight: float, seed: float,
  ) -> Told:
    """What lies between two images; (picture, words)."""
    if not 0 <= weight <= 1:
      raise errors.UserError(f"the weight is {weight}; it lies from 0 to 1")
    ends = self.read(first), self.read(second)
    (label, note), (second_label, other) = (
        self._class_of(of, image)
        for of, image in zip((label, second_label), ends, strict=True)
    )
    images, seconds = _timed(
        self.editor.interpolate, *ends, label, second_label, (weight,),
        _seed(seed),
    )
    recipe = self.model.recipe("interpolate")
    return self.enlarge(images[0, 0]), _told(
        recipe.nfe + recipe.plans[0].nfe, seconds, recipe,
        "both ends inverted", note, other,
    )

  def inpaint(
      self, painted: Mapping[str, Any] | None, label: int | None, seed: float,
      task: str,
  ) -> Told:
    """Fills what was painted over; (picture, words).

    Args:
      painted: 'background' and 'layers', the bytes of image files.
      label: class.
      seed: of the noise.
      task: 'inpaint' or 'inpaint_cm'.
    """
    if not painted or painted.get("background") is None:
      raise errors.UserError("there is no image yet; upload or drop one")
    image = self._image(painted["background"], "the image")[None]
    mask = self._mask(painted.get("layers") or [])
    recipe = self.model.recipe(task)
    label, note = self._class_of(label, edit_inputs.covered(image, mask))
    images, seconds = _timed(
        self.editor.inpaint, image, mask, label, _seed(seed), task
    )
    words = _told(
        recipe.nfe, seconds, recipe, f"{int(mask.sum())} pixels filled", note
    )
    return self.enlarge(images[0]), words

  def restore(
      self, path: str | None, label: int | None, quality: float, noise: float,
      nfe: float, seed: float,
  ) -> tuple[np.ndarray, np.ndarray, str]:
    """Compresses and restores; (compressed, restored, words)."""
    image = self.read(path)
    given = edit_inputs.compress(image[0], int(quality))[None]
    settings = dict(noise=noise, nfe=int(nfe))
    recipe = self.model.recipe("restore", **settings)
    label, note = self._class_of(label, given)
    images, seconds = _timed(
        self.editor.restore, given, label, _seed(seed), **settings
    )
    before, after = (
        float(reconstruction.psnr(reconstruction.per_pixel_mse(image, x))[0])
        for x in (given, images)
    )
    words = _told(
        recipe.nfe, seconds, recipe,
        f"PSNR {before:.1f} dB compressed, {after:.1f} dB restored", note,
    )
    return self.enlarge(given[0]), self.enlarge(images[0]), words

  # Inside -------------------------------------------------------------------

  def _label(self, label: int | None) -> int | None:
    if not self.classes or label in (None, ALL):
      return None
    return int(label)

  def _class_of(
      self, label: int | None, image: np.ndarray
  ) -> tuple[int | None, str]:
    """(an image's class, what is to be told of it)."""
    if label != FIND or not self.classes:
      return self._label(label), ""
    found = int(self.editor.classify(image)[0])
    return found, f"class {found} found"

  def _mask(self, layers: Sequence[bytes]) -> np.ndarray:
    """Pixels that are painted over on any layer: bool [H, W]."""
    height, width = self.model.image_shape[:2]
    mask = np.zeros((height, width), bool)
    for layer in layers:
      paint = edit_inputs.open_picture(layer, "the paint", _MOST_PIXELS)
      alpha = np.asarray(paint.convert("RGBA").getchannel("A"))
      mask |= edit_inputs.covered_share(alpha, height, width) > _PAINTED
    if not mask.any():
      raise errors.UserError(
          "nothing is painted over; paint on the image what is to be filled"
      )
    return mask


def _fits(sampler: str, nfe: float) -> int:
  """An NFE that a sampler can have: Heun makes two a level but the last."""
  nfe = int(nfe)
  if sampler == "heun":
    return max(3, nfe - 1 + nfe % 2)
  return max(2, nfe) if sampler == "ddim" else nfe


def _timed(function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, float]:
  began = time.perf_counter()
  result = function(*args, **kwargs)
  return result, time.perf_counter() - began


def _seed(seed: float | None) -> int:
  """A whole number of 32 bits.

  Raises:
    UserError: it is none.
  """
  if seed is None or seed != int(seed) or not 0 <= seed < 2**31:
    raise errors.UserError(f"the seed is {seed}; give a whole number from 0 on")
  return int(seed)


def _told(nfe: int, seconds: float, plan: Any, *more: str) -> str:
  """What was done, as Markdown."""
  line = ", ".join(
      [f"**{nfe} NFE, {seconds * 1e3:.0f} ms**", *filter(None, more)]
  )
  return f"{line}\n```\n{plan}\n```"
