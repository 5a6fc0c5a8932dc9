"""The 1,797 handwritten digits that ship with scikit-learn.

8x8 gray images of 10 classes (Alpaydin and Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998). Nothing is
downloaded. `digits` reads them through TFDS if TensorFlow is installed and
directly from scikit-learn otherwise, with the same examples in the same order.
"""

import functools

from absl import logging
import numpy as np

from bcm_jax.data.image_source import ArraySource
from bcm_jax.errors import unknown_name

NUM_CLASSES = 10
SPLIT_SIZES = {"train": 1437, "test": 360}


def check_split(split: str) -> None:
  """Raises UserError for an unknown split and suggests the closest name."""
  if split not in SPLIT_SIZES:
    raise unknown_name("split of digits", split, SPLIT_SIZES)


@functools.cache
def _split_ids() -> dict[str, np.ndarray]:
  """Returns each split's example ids in scikit-learn's order."""
  from sklearn import datasets  # Imported late: slow, and used only here.
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
  """Returns one split as arrays, read from scikit-learn.

  The split is train_test_split(test_size=360, stratify=labels,
  random_state=0). Gray levels v in 0..16 are mapped to round(v * 255 / 16).

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
  """Returns one split of the digits, read from scikit-learn.

  Args:
    split: 'train' (1,437 examples) or 'test' (360).

  Raises:
    UserError: unknown split.
  """
  images, labels = digit_arrays(split)
  return ArraySource(images, labels, NUM_CLASSES, name=f"digits/{split}")


def digits(split: str, data_dir: str | None = None) -> ArraySource:
  """Returns one split of the digits, read through TFDS if it is installed.

  Falls back to scikit-learn if TensorFlow, TFDS or array_record cannot be
  imported, and (with a warning) if TFDS's default folder is not writable.

  Args:
    split: 'train' (1,437 examples) or 'test' (360).
    data_dir: TFDS folder; None uses TFDS_DATA_DIR, or TFDS's default.

  Raises:
    UserError: unknown split, a `data_dir` that is not writable, or a prepared
      copy without random access (see `digits_tfds.load_digits_tfds`).
  """
  check_split(split)
  try:
    from bcm_jax.data import digits_tfds
  except ImportError as error:
    logging.info("digits: read from scikit-learn without TFDS: %s", error)
    return load_digits(split)
  try:
    return digits_tfds.load_digits_tfds(split, data_dir)
  except OSError as error:
    logging.warning(
        "digits: read from scikit-learn, because the TFDS folder cannot be used"
        " (%s); set TFDS_DATA_DIR to a writable folder",
        error,
    )
    return load_digits(split)
