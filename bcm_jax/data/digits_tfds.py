"""TFDS builder of the scikit-learn digits.

Importing this module requires TensorFlow, TFDS and array_record; use
`digits.digits` to fall back to scikit-learn without them. The dataset is
prepared on first use, as array_record, for random access.
"""

import os

from absl import logging

# TFDS imports the other two lazily; importing them here raises ImportError
# early, where `digits.digits` catches it.
import array_record  # noqa: F401
from google.protobuf import json_format
import numpy as np
import tensorflow  # noqa: F401
import tensorflow_datasets as tfds

from bcm_jax.data import digits
from bcm_jax.data.image_source import ArraySource
from bcm_jax.errors import UserError

_FILE_FORMAT = "array_record"


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
  """The scikit-learn digits: 8x8 gray images, 10 classes."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  # Set explicitly, because TFDS 4.9.10 otherwise imports importlib_resources,
  # which is not among its dependencies.
  code_path = tfds.core.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description="The 1,797 handwritten digits that scikit-learn ships.",
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=digits.NUM_CLASSES),
        }),
        supervised_keys=("image", "label"),
        # Keeps the order of the integer keys, that of `digits.digit_arrays`.
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {
        split: self._generate_examples(split) for split in digits.SPLIT_SIZES
    }

  def _generate_examples(self, split):
    images, labels = digits.digit_arrays(split)
    for key, image in enumerate(images):
      yield key, {"image": image, "label": int(labels[key])}


def _prepared_builder(data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns a builder with prepared files; prepares them on first use."""
  builder = SklearnDigits(data_dir=data_dir)
  if builder.data_path.exists():
    return builder
  try:
    # Preparation takes about a second.
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format=_FILE_FORMAT)
  except OSError:
    # TFDS renames a temporary folder when it is complete. The rename fails if
    # another process finished first; use the copy of that process.
    if not builder.data_path.exists():
      raise
    builder = SklearnDigits(data_dir=data_dir)
  return builder


def load_digits_tfds(split: str, data_dir: str | None = None) -> ArraySource:
  """Returns one split of the digits, read through TFDS into memory.

  Several processes can prepare the same folder concurrently.

  Args:
    split: 'train' (1,437 examples) or 'test' (360).
    data_dir: TFDS folder; None uses TFDS_DATA_DIR, or TFDS's default.

  Raises:
    UserError: unknown split, a `data_dir` that is not writable, or a prepared
      copy that is corrupt or not in array_record format.
    OSError: `data_dir` is None and the default folder is not writable.
  """
  digits.check_split(split)
  # TFDS reads the variable only on import; this also honors later changes.
  folder = data_dir or os.environ.get("TFDS_DATA_DIR")
  try:
    builder = _prepared_builder(folder)
  except OSError as error:
    if data_dir is None:
      raise
    raise UserError(
        f"data_dir: cannot prepare the digits in {data_dir!r} ({error}),"
        " expected a writable folder; choose another one"
    ) from error
  except json_format.ParseError as error:
    raise UserError(
        f"{folder or 'TFDS default folder'}: dataset_info.json of the digits"
        f" cannot be read ({error}); delete its folder {SklearnDigits.name} and"
        " run again"
    ) from error
  _check_random_access(builder)
  # Silences the warning that images are decoded without OpenCV.
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    examples = _read(builder, split)
  finally:
    logging.set_verbosity(verbosity)
  images = np.stack([example["image"] for example in examples])
  labels = np.array([example["label"] for example in examples], np.int32)
  return ArraySource(
      images, labels, digits.NUM_CLASSES, name=f"digits/{split}"
  )


def _check_random_access(builder: tfds.core.DatasetBuilder) -> None:
  formats = {form.value for form in builder.info.available_file_formats()}
  if _FILE_FORMAT not in formats:
    raise UserError(
        f"{builder.data_dir}: got file format"
        f" {' and '.join(sorted(formats)) or 'unknown'}, expected"
        f" {_FILE_FORMAT} (random access); delete that folder and run again to"
        " prepare it, or choose another data_dir"
    )


def _read(builder: tfds.core.DatasetBuilder, split: str) -> list[dict]:
  expected = digits.SPLIT_SIZES[split]
  try:
    data = builder.as_data_source(split, file_format=_FILE_FORMAT)
    examples = [data[index] for index in range(len(data))]
    problem = f"{len(examples)} examples"
  except Exception as error:  # TFDS raises many types for corrupt files.
    examples, problem = [], f"{type(error).__name__}: {error}"
  if len(examples) != expected:
    raise UserError(
        f"{builder.data_dir}: got {problem} in split {split!r}, expected"
        f" {expected} examples; delete that folder and run again"
    )
  return examples
