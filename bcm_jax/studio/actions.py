"""Callbacks of the web interface, independent of the UI framework.

Images are enlarged for display, so that 8x8 pixels can be seen and painted on;
uploads are cropped and resized to the network's image size.
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

# Approximate side of an image in the browser, in pixels.
CANVAS = 256
# Limit for uploads, checked before decoding; 24 megapixels are a large photo.
_MAX_PIXELS = 24_000_000
# In place of a class: all classes in turn.
ALL = -1
# In place of a class: the class predicted by the network.
PREDICT = -2
# Largest number of images per request.
MAX_IMAGES = 25
# Inpainting tasks; the second one needs no inversion.
INPAINTING = ("inpaint", "inpaint_cm")
# Largest NFE of an inversion.
_MAX_INVERSION_NFE = 32
# Fraction of a pixel that must be painted for the pixel to be masked.
_PAINTED = 0.25

ImageAndCaption = tuple[np.ndarray, str]


class Studio:
  """A model, and the callbacks of the web interface.

  Attributes:
    model: the network, evaluated in batches.
    editor: the same network at batch size 1.
    scale: display pixels per image pixel.
    samplers: samplers that the network supports.
    classes: (name, label) of every class, () for an unconditional network.
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
    # Includes Heun's method on all noise levels of the config.
    self.max_nfe = max(32, 2 * model.experiment.sample.num_levels - 1)

  def nfe_slider(self, sampler: str) -> dict[str, Any]:
    """Returns the settings of the slider of NFE for a sampler.

    Heun's method on N noise levels takes 2 N - 1 evaluations; 'onestep' always
    takes one, without a slider.
    """
    _choice("sampler", sampler, self.samplers)
    return {
        "visible": sampler != "onestep",
        "minimum": {"heun": 3, "ddim": 2}.get(sampler, 1),
        "step": 2 if sampler == "heun" else 1,
        "value": 15 if self.model.experiment.method.is_denoiser else 2,
    }

  def warm_up(self) -> None:
    """Compiles the network for both batch sizes, before the first request."""
    sampler = "onestep"
    if sampler not in self.samplers:
      sampler = f"{self.samplers[0]}:3"
    for model, count in ((self.model, 16), (self.editor, 1)):
      model.sample(count, sampler=sampler)

  # Images -------------------------------------------------------------------

  def enlarge(self, image: np.ndarray) -> np.ndarray:
    """Upsamples an image uint8 [H, W, C] to [sH, sW, 3] for display."""
    large = image.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
    return np.broadcast_to(large, (*large.shape[:2], 3)).copy()

  def read(self, path: str | None) -> np.ndarray:
    """Reads an uploaded file as uint8 [1, H, W, C].

    A displayed image that is uploaded again gives exactly the original pixels.

    Raises:
      UserError: no upload, not an image, or too many pixels.
    """
    if path is None:
      raise errors.UserError("image: got none; upload or drop one")
    with open(path, "rb") as f:
      return self._image(f.read(), os.path.basename(path))[None]

  def _image(self, content: bytes, name: str) -> np.ndarray:
    """Decodes a file to uint8 [H, W, C]; undoes `enlarge` exactly."""
    height, width, channels = self.model.image_shape
    opened = edit_inputs.open_picture(content, name, _MAX_PIXELS)
    pixels = edit_inputs.pixels_of(opened, channels)
    if pixels.shape[:2] == (height * self.scale, width * self.scale):
      small = pixels[:: self.scale, :: self.scale]
      blocks = small.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
      if (blocks == pixels).all():
        return small
    return edit_inputs.fitted(pixels, height, width)

  def example(self, index: int) -> np.ndarray | None:
    """Returns an enlarged test image, None without a test split."""
    experiment = self.model.experiment
    try:
      source = experiment.source("test")
      index %= len(source)
      return self.enlarge(source.fetch(np.array([index]))["image"][0])
    except (errors.UserError, OSError):
      return None

  def example_label(self, index: int) -> int | None:
    """Returns the class of a test image, None for unconditional networks."""
    if not self.classes:
      return None
    source = self.model.experiment.source("test")
    return int(source.fetch(np.array([index % len(source)]))["label"][0])

  # Callbacks ----------------------------------------------------------------

  def generate(
      self, label: int | None, seed: float, count: float, sampler: str,
      nfe: float,
  ) -> ImageAndCaption:
    """Samples images.

    Args:
      label: class; None or ALL for all classes in turn.
      seed: seed of the noise.
      count: number of images, 1 to MAX_IMAGES.
      sampler: one of `samplers`.
      nfe: network evaluations; not used by 'onestep'.

    Returns:
      (grid of images, caption).

    Raises:
      UserError: a value out of range, or an NFE that the sampler does not have.
    """
    count = _whole("images", count, 1, MAX_IMAGES)
    nfe = _whole("NFE", nfe, 1, self.max_nfe)
    text = _choice("sampler", sampler, self.samplers)
    if text != "onestep":
      text += f":{nfe}"
    plan = planning.plan_of(self.model.experiment, text)
    images, seconds = _timed(
        self.model.sample, count, self._label(label), _seed(seed), text
    )
    columns = math.ceil(math.sqrt(count))
    grid = image_grid.image_grid(
        images, columns, scale=max(1, 2 * self.scale // (columns + 1))
    )
    return np.broadcast_to(grid, (*grid.shape[:2], 3)), _caption(
        plan.nfe, seconds, plan
    )

  def reconstruct(
      self, path: str | None, label: int | None, noise: float, nfe: float,
      seed: float,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Inverts an image and reconstructs it from the latent.

    Args:
      path: uploaded file.
      label: class; PREDICT for the network's prediction.
      noise: standard deviation of the noise added before the inversion.
      nfe: network evaluations of the inversion; the reconstruction is one more.
      seed: seed of the noise.

    Returns:
      (input of the network, latent, reconstruction, caption).
    """
    image = self.read(path)
    seed, nfe = _seed(seed), _whole("NFE", nfe, 1, _MAX_INVERSION_NFE)
    noise = self._noise(noise)
    label, note = self._class_of(label, image)
    plan = planning.inversion_plan(self.model.experiment, nfe, noise)
    latents, inversion_secs = _timed(
        self.editor.invert, image, label, seed, noise, nfe
    )
    images, decoding_secs = _timed(self.editor.decode, latents, label, seed)
    sigma_max = self.model.experiment.levels.sigma_max
    latent = image_source.to_uint8(latents / (3 * sigma_max))
    mse = float(reconstruction.per_pixel_mse(image, images)[0])
    caption = _caption(
        nfe + 1, inversion_secs + decoding_secs,
        f"{plan}\nonestep: 1 NFE, reconstruction",
        f"MSE {mse:.4f} on [0, 1], PSNR {float(reconstruction.psnr(mse)):.1f}"
        " dB", note,
    )
    return (*map(self.enlarge, (image[0], latent[0], images[0])), caption)

  def interpolate(
      self, first: str | None, second: str | None, label: int | None,
      second_label: int | None, weight: float, seed: float,
  ) -> ImageAndCaption:
    """Interpolates between the latents of two images.

    Args:
      first: uploaded file.
      second: uploaded file of the other end.
      label: class of the first image; PREDICT for the network's prediction.
      second_label: class of the second image, likewise.
      weight: weight of the second image, 0 to 1.
      seed: seed of the noise.

    Returns:
      (interpolated image, caption).
    """
    weight, seed = _number("weight", weight, 0, 1), _seed(seed)
    ends = self.read(first), self.read(second)
    (label, note), (second_label, second_note) = (
        self._class_of(choice, image)
        for choice, image in zip((label, second_label), ends, strict=True)
    )
    images, seconds = _timed(
        self.editor.interpolate, *ends, label, second_label, (weight,), seed
    )
    recipe = self.model.recipe("interpolate")
    return self.enlarge(images[0, 0]), _caption(
        recipe.nfe + recipe.plans[0].nfe, seconds, recipe,
        "both ends inverted", note, second_note,
    )

  def inpaint(
      self, painted: Mapping[str, Any] | None, label: int | None, seed: float,
      task: str,
  ) -> ImageAndCaption:
    """Inpaints the painted pixels.

    Args:
      painted: 'background' and 'layers', the bytes of image files.
      label: class; PREDICT for the network's prediction.
      seed: seed of the noise.
      task: 'inpaint' or 'inpaint_cm'.

    Returns:
      (inpainted image, caption).
    """
    task, seed = _choice("task", task, INPAINTING), _seed(seed)
    if not painted or painted.get("background") is None:
      raise errors.UserError("image: got none; upload or drop one")
    image = self._image(painted["background"], "the image")[None]
    mask = self._mask(painted.get("layers") or [])
    recipe = self.model.recipe(task)
    label, note = self._class_of(label, edit_inputs.covered(image, mask))
    images, seconds = _timed(
        self.editor.inpaint, image, mask, label, seed, task
    )
    caption = _caption(
        recipe.nfe, seconds, recipe, f"{int(mask.sum())} pixels filled", note
    )
    return self.enlarge(images[0]), caption

  def restore(
      self, path: str | None, label: int | None, quality: float, noise: float,
      nfe: float, seed: float,
  ) -> tuple[np.ndarray, np.ndarray, str]:
    """Compresses an image as JPEG and restores it.

    Args:
      path: uploaded file.
      label: class; PREDICT for the network's prediction.
      quality: JPEG quality, 1 to 95.
      noise: standard deviation of the noise added before the inversion.
      nfe: network evaluations.
      seed: seed of the noise.

    Returns:
      (compressed image, restored image, caption).
    """
    image = self.read(path)
    quality, seed = _whole("JPEG quality", quality, 1, 95), _seed(seed)
    compressed = edit_inputs.compress(image[0], quality)[None]
    settings = dict(
        noise=self._noise(noise),
        nfe=_whole("NFE", nfe, 2, _MAX_INVERSION_NFE),
    )
    recipe = self.model.recipe("restore", **settings)
    label, note = self._class_of(label, compressed)
    images, seconds = _timed(
        self.editor.restore, compressed, label, seed, **settings
    )
    before, after = (
        float(reconstruction.psnr(reconstruction.per_pixel_mse(image, x))[0])
        for x in (compressed, images)
    )
    caption = _caption(
        recipe.nfe, seconds, recipe,
        f"PSNR {before:.1f} dB compressed, {after:.1f} dB restored", note,
    )
    return self.enlarge(compressed[0]), self.enlarge(images[0]), caption

  # Helpers ------------------------------------------------------------------

  def _label(self, label: int | None) -> int | None:
    if not self.classes or label is None or label == ALL:
      return None
    return _whole("class", label, 0, len(self.classes) - 1)

  def _noise(self, noise: Any) -> float:
    levels = self.model.experiment.levels
    return _number("noise", noise, levels.sigma_min, levels.sigma_max)

  def _class_of(
      self, label: int | None, image: np.ndarray
  ) -> tuple[int | None, str]:
    """Returns (class of an image, note for the caption)."""
    if label != PREDICT or not self.classes:
      return self._label(label), ""
    predicted = int(self.editor.classify(image)[0])
    return predicted, f"class {predicted} predicted"

  def _mask(self, layers: Sequence[bytes]) -> np.ndarray:
    """Mask of the pixels painted on any layer, bool [H, W]."""
    height, width = self.model.image_shape[:2]
    mask = np.zeros((height, width), bool)
    for layer in layers:
      paint = edit_inputs.open_picture(layer, "the mask", _MAX_PIXELS)
      alpha = np.asarray(paint.convert("RGBA").getchannel("A"))
      mask |= edit_inputs.covered_share(alpha, height, width) > _PAINTED
    if not mask.any():
      raise errors.UserError(
          "mask: nothing is painted; paint over the region to fill"
      )
    return mask


def _timed(function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, float]:
  start = time.perf_counter()
  result = function(*args, **kwargs)
  return result, time.perf_counter() - start


def _number(
    name: str, value: Any, low: float, high: float, kind: str = "a number"
) -> float:
  """Returns a number of a request, which may be null, NaN, or any JSON.

  Raises:
    UserError: not a number from low to high.
  """
  # NaN is not in the range; true and false are no numbers.
  if type(value) not in (int, float) or not low <= value <= high:
    raise errors.UserError(
        f"{name}: got {_shown(value)}, expected {kind} from {low:.10g} to "
        f"{high:.10g}; choose another"
    )
  return value


def _whole(name: str, value: Any, low: int, high: int) -> int:
  """Returns a whole number of a request; raises UserError as `_number`."""
  kind = "a whole number"
  if isinstance(value, float) and not value.is_integer():
    value = _shown(value)
  return int(_number(name, value, low, high, kind))


def _seed(seed: Any) -> int:
  return _whole("seed", seed, 0, 2**31 - 1)


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
  """Returns a name of a request; raises UserError if it is not a choice."""
  if value not in choices:
    raise errors.unknown_name(name, _shown(value), choices)
  return value


def _shown(value: Any) -> str:
  return str(value)[:80]


def _caption(nfe: int, seconds: float, plan: Any, *notes: str) -> str:
  """Describes a computation in Markdown: cost, notes and sampling plan."""
  line = ", ".join(
      [f"**{nfe} NFE, {seconds * 1e3:.0f} ms**", *filter(None, notes)]
  )
  return f"{line}\n```\n{plan}\n```"
