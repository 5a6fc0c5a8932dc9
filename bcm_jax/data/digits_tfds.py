"""The handwritten digits of `digits` as a TFDS data set.

Importing this module needs TensorFlow, TFDS and array_record; `digits.digits`
is the way in that works without them. The data set is prepared on first use,
as array_record, so that examples can be read by index.
"""

import os

from absl import logging

# TFDS imports the other two only when first used; asking for them here turns
# their absence into an ImportError at a place where it can be caught.
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
  """The digits that ship with scikit-learn, 8x8 grey, 10 classes."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  # Found by TFDS itself, this would need importlib_resources, which TFDS
  # 4.9.10 imports without requiring it.
  code_path = tfds.core.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description="The 1,797 handwritten digits that scikit-learn ships.",
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=digits.NUM_CLASSES),
        }),
        supervised_keys=("image", "label"),
        # With integer keys: index i here is index i of `digits.digit_arrays`.
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
  """Returns a builder whose data are on disk, preparing them if need be."""
  builder = SklearnDigits(data_dir=data_dir)
  if builder.data_path.exists():
    return builder
  try:
    # No bars for what takes a second.
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format=_FILE_FORMAT)
  except OSError:
    # TFDS writes to a folder of its own and renames it when complete, which
    # fails if another process was first: its copy is as good as ours.
    if not builder.data_path.exists():
      raise
    builder = SklearnDigits(data_dir=data_dir)
  return builder


def load_digits_tfds(split: str, data_dir: str | None = None) -> ArraySource:
  """Returns one split of the digits, read through TFDS.

  The split is small and is read into memory at once. Processes may prepare the
  same folder at the same time.

  Args:
    split: 'train' (1,437 examples) or 'test' (360).
    data_dir: TFDS folder; None means TFDS_DATA_DIR, or TFDS's default.

  Raises:
    UserError: unknown split, a `data_dir` that cannot be written, or a copy
      there that is not array_record or is damaged.
    OSError: `data_dir` is None and the default folder cannot be written.
  """
  digits.check_split(split)
  # TFDS reads the variable when imported; a later change counts here, too.
  folder = data_dir or os.environ.get("TFDS_DATA_DIR")
  try:
    builder = _prepared_builder(folder)
  except OSError as error:
    if data_dir is None:
      raise
    raise UserError(
        f"cannot prepare the digits in data_dir {data_dir!r} ({error}),"
        " expected a folder that can be written; name another one"
    ) from error
  except json_format.ParseError as error:
    raise UserError(
        f"dataset_info.json of the digits in {folder or 'TFDS default folder'}"
        f" cannot be read ({error}); delete {SklearnDigits.name} there and run"
        " again"
    ) from error
  _check_random_access(builder)
  # Decoding 8x8 images without OpenCV is no news to anybody.
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
        f"{builder.data_dir} holds the digits as"
        f" {' and '.join(sorted(formats)) or 'unknown files'}, expected"
        f" {_FILE_FORMAT}, which can be read by index; delete that folder and"
        " run again (it is prepared anew), or name another data_dir"
    )


def _read(builder: tfds.core.DatasetBuilder, split: str) -> list[dict]:
  expected = digits.SPLIT_SIZES[split]
  try:
    data = builder.as_data_source(split, file_format=_FILE_FORMAT)
    examples = [data[index] for index in range(len(data))]
    problem = f"{len(examples)} examples"
  except Exception as error:  # Whatever a damaged file makes TFDS raise.
    examples, problem = [], f"{type(error).__name__}: {error}"
  if len(examples) != expected:
    raise UserError(
        f"{builder.data_dir} is damaged: split {split!r} gave {problem},"
        f" expected {expected} examples; delete that folder and run again"
    )
  return examples
