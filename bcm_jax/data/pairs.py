"""Pairs (noise, teacher sample) for DMD's regression loss (Yin et al., 2023).

The .npz file is written by --mode=pairs: `noise` float16 [n, H, W, C] with unit
standard deviation, where sigma_max * noise is the initial state of the
teacher's solver; `image` uint8 [n, H, W, C]; `label` int32 [n]; and `facts`, a
JSON string with the provenance of the pairs.
"""

import json

import numpy as np

from bcm_jax.data import image_source
from bcm_jax.data import npz_file
from bcm_jax.errors import UserError

FIELDS = ("noise", "image", "label", "facts")


class PairSource(image_source.ArraySource):
  """Image source of teacher pairs, with the noise of each image.

  Args:
    path: path of the .npz file.
    image_shape: expected shape (H, W, C) of the images.
    num_classes: number of classes; None without labels.

  Raises:
    UserError: the file is missing, has other arrays, or other image shapes.
  """

  def __init__(
      self, path: str, image_shape: tuple[int, ...], num_classes: int | None
  ):
    try:
      arrays = npz_file.read_arrays(path, FIELDS)
    except UserError as e:
      raise UserError(f"data.pairs: {e}") from e
    try:
      self.facts = json.loads(str(arrays["facts"]))
      missing = [k for k in FIELDS if k not in arrays]
    except (KeyError, ValueError, RecursionError):
      missing = ["facts"]
    if missing:
      raise UserError(
          f"data.pairs: {path} is not a file of pairs (no {missing[0]}); create"
          " one with python -m bcm_jax.main --workdir=TEACHER --mode=pairs"
      )
    images, self._noise = arrays["image"], arrays["noise"]
    if images.shape[1:] != tuple(image_shape) or (
        images.shape != self._noise.shape
    ):
      raise UserError(
          f"data.pairs: got images {images.shape[1:]} and noise "
          f"{self._noise.shape[1:]} in {path}, expected {tuple(image_shape)}; "
          "create pairs with a teacher of the same dataset"
      )
    if self._noise.dtype.kind != "f" or not np.isfinite(self._noise).all():
      raise UserError(
          f"data.pairs: got noise {self._noise.dtype} in {path}, expected"
          " finite floating-point numbers; create the pairs again"
      )
    labels = arrays["label"] if num_classes is not None else None
    super().__init__(images, labels, num_classes, path)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image, label, and noise float16 [n, H, W, C]."""
    return super().fetch(indices) | {"noise": self._noise[indices]}
