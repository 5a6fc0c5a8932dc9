"""Images of other programs, to evaluate: image files or an .npz."""

import os

import numpy as np

from bcm_jax import errors
from bcm_jax.data import decoding
from bcm_jax.data import folder
from bcm_jax.metrics import reference_stats


def read(
    path: str, shape: tuple[int, int, int], num_classes: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
  """Reads all images of eval.samples.

  Args:
    path: .npz with arr_0 uint8 [n, H, W, C] and perhaps arr_1 [n] labels, as
      written by mode sample and by ADM's samplers; or a folder of image files,
      searched with its subfolders in the order of names.
    shape: (H, W, C) of the data set.
    num_classes: number of classes of the data set, or None.

  Returns:
    (images uint8 [n, H, W, C], labels int32 [n] or None).

  Raises:
    UserError: no images, other sizes or channels, labels out of range, or
      files that cannot be read.
  """
  path, labels = os.path.expanduser(path), None
  if os.path.isdir(path):
    images = _folder(path, shape)
  else:
    images = reference_stats.load_reference(path).images
    labels = reference_stats.load_labels(path)
  if images is None or images.shape[1:] != shape or not len(images):
    got = "no images" if images is None else f"images {images.shape}"
    raise errors.UserError(
        f"eval.samples: got {path} with {got}, expected arr_0 uint8 [n, "
        f"{', '.join(map(str, shape))}]"
    )
  if labels is not None:
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or (
        labels.min() < 0 or labels.max() >= (num_classes or 1)
    ):
      raise errors.UserError(
          f"eval.samples: got {path} with arr_1 {labels.dtype} of shape "
          f"{labels.shape}, expected classes from 0 to {(num_classes or 1) - 1}"
      )
    labels = labels.astype(np.int32) if num_classes else None
  return images, labels


def _folder(path: str, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads image files of a folder and its subfolders: uint8 [n, H, W, C]."""
  names = sorted(
      os.path.join(at, name)
      for at, folders, files in os.walk(path)
      for name in files
      if name.lower().endswith(folder.EXTENSIONS) and name[0] != "."
  )
  if not names:
    raise errors.UserError(
        f"eval.samples: got {path}, expected images "
        f"({', '.join(folder.EXTENSIONS)}) in this folder"
    )
  decode = decoding.Decoder(shape[2])
  images = np.empty((len(names), *shape), np.uint8)
  for i, name in enumerate(names):
    with open(name, "rb") as file:
      image = decode(file.read(), name)
    if image.shape != shape:
      raise errors.UserError(
          f"eval.samples: got {name} of {image.shape}, expected {shape}"
      )
    images[i] = image
  return images
