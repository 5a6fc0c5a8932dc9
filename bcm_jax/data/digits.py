"""The 1,797 handwritten digits that ship with scikit-learn.

8x8 grey images of 10 classes (Alpaydin and Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998). Nothing is
downloaded. `digits` reads them through TFDS where TensorFlow is installed and
straight from scikit-learn where it is not: the same examples under the same
indices.
"""

import functools

from absl import logging
import numpy as np

from bcm_jax.data.image_source import ArraySource
from bcm_jax.errors import unknown_name

NUM_CLASSES = 10
SPLIT_SIZES = {"train": 1437, "test": 360}


def check_split(split: str) -> None:
  """Raises UserError, naming the nearest split, unless `split` is known."""
  if split not in SPLIT_SIZES:
    raise unknown_name("split of digits", split, SPLIT_SIZES)


@functools.cache
def _split_ids() -> dict[str, np.ndarray]:
  """Returns each split's example ids in scikit-learn's order."""
  from sklearn import datasets  # Slow to import, and used once.
  from sklearn import model_selection

  labels = datasets.load_digits().target
  train, test = model_selection.train_test_split(
      np.arange(len(labels)),
      test_size=SPLIT_SIZES["test"],
      stratify=labels,
      random_state=0,
  )
  return dict(train=train, test=test)


def digit_arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns one split as arrays, straight from scikit-learn.

  The split is train_test_split(test_size=360, stratify=labels,
  random_state=0). Grey levels 0..16 become round(v * 255 / 16).

  Args:
    split: 'train' (1,437 examples) or 'test' (360).

  Returns:
    images uint8 [n, 8, 8, 1] and labels int32 [n] in 0..9.

  Raises:
    UserError: unknown split.
  """
  from sklearn import datasets

  check_split(split)
  data, ids = datasets.load_digits(), _split_ids()[split]
  images = np.rint(data.images[ids] * 255 / 16).astype(np.uint8)
  return images[..., None], data.target[ids].astype(np.int32)


def load_digits(split: str) -> ArraySource:
  """Returns one split of the digits, straight from scikit-learn.

  Args:
    split: 'train' (1,437 examples) or 'test' (360).

  Raises:
    UserError: unknown split.
  """
  images, labels = digit_arrays(split)
  return ArraySource(images, labels, NUM_CLASSES, name=f"digits/{split}")


def digits(split: str, data_dir: str | None = None) -> ArraySource:
  """Returns one split of the digits: through TFDS if it is there.

  Falls back to scikit-learn where TensorFlow, TFDS or array_record cannot be
  imported, and (with a warning) where TFDS's default folder cannot be written.

  Args:
    split: 'train' (1,437 examples) or 'test' (360).
    data_dir: TFDS folder; None means TFDS's default, or TFDS_DATA_DIR.

  Raises:
    UserError: unknown split, a `data_dir` that cannot be used, or a copy there
      without random access (see `digits_tfds.load_digits_tfds`).
  """
  check_split(split)
  try:
    from bcm_jax.data import digits_tfds
  except ImportError as error:
    logging.info("digits come straight from scikit-learn: %s", error)
    return load_digits(split)
  try:
    return digits_tfds.load_digits_tfds(split, data_dir)
  except OSError as error:
    logging.warning(
        "digits come straight from scikit-learn, for the TFDS folder cannot be"
        " used (%s); set TFDS_DATA_DIR to a folder that can be written",
        error,
    )
    return load_digits(split)
