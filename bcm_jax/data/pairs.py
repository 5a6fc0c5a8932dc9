"""Pairs of a noise and the image that a teacher's solver made of it.

A file, written by mode pairs: `noise` float16 [n, H, W, C], of deviation 1 and
exactly what the solver started from (times sigma_max), `image` uint8 of the
same shape, `label` int32 [n], and `facts`, JSON of how they were made.
"""

import json
import zipfile

import numpy as np

from bcm_jax.data import image_source
from bcm_jax.errors import UserError

FIELDS = ("noise", "image", "label", "facts")


class PairSource(image_source.ArraySource):
  """The images of a file of pairs, each with its noise.

  Args:
    path: the file.
    image_shape: (H, W, C) that the images must have.
    num_classes: classes, or None.

  Raises:
    UserError: no such file, or one of another kind or data set.
  """

  def __init__(
      self, path: str, image_shape: tuple[int, ...], num_classes: int | None
  ):
    try:
      with np.load(path) as file:
        arrays = {k: file[k] for k in FIELDS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
      raise UserError(
          f"data.pairs={path} is no file of pairs ({e}); make one with "
          "python -m bcm_jax.main --workdir=TEACHER --mode=pairs"
      ) from e
    self.facts = json.loads(str(arrays["facts"]))
    images, self._noise = arrays["image"], arrays["noise"]
    if images.shape[1:] != tuple(image_shape) or (
        images.shape != self._noise.shape
    ):
      raise UserError(
          f"data.pairs={path} holds images {images.shape[1:]} and noise "
          f"{self._noise.shape[1:]}, expected {tuple(image_shape)}; make pairs "
          "with a teacher of the same data"
      )
    labels = arrays["label"] if num_classes is not None else None
    super().__init__(images, labels, num_classes, path)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Image, label, and noise float16 [n, H, W, C]."""
    return super().fetch(indices) | {"noise": self._noise[indices]}
