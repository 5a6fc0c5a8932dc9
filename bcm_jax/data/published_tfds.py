"""CIFAR-10 and ImageNet-64 through TFDS, read by index.

Importing this module needs TensorFlow Datasets; opening a set needs its files
prepared as array_record, which gives random access.
"""

import numpy as np
import tensorflow_datasets as tfds

from bcm_jax import errors

# Our name -> (TFDS name, TFDS split of 'train' and 'test').
NAMES = {
    "cifar10": ("cifar10", {"train": "train", "test": "test"}),
    "imagenet64": (
        "imagenet_resized/64x64", {"train": "train", "test": "validation"}
    ),
}


class TFDSSource:
  """A `Source` over a prepared TFDS data set; see data.source.

  Args:
    name: key of NAMES.
    split: 'train' or 'test'.
    image_shape: (H, W, C).
    num_classes: number of classes.
    data_dir: TFDS folder; None means TFDS's default.

  Raises:
    UserError: unknown split, or no prepared copy with random access.
  """

  def __init__(self, name, split, image_shape, num_classes, data_dir=None):
    there, splits = NAMES[name]
    if split not in splits:
      raise errors.unknown_name(f"split of {name}", split, splits)
    self.name = f"{name}/{split}"
    self.image_shape, self.num_classes = image_shape, num_classes
    try:
      builder = tfds.builder(there, data_dir=data_dir)
      self._data = builder.as_data_source(splits[split])
    except Exception as e:  # Whatever TFDS raises for files that are not there.
      raise errors.UserError(
          f"{self.name} cannot be read ({type(e).__name__}: "
          f"{' '.join(str(e).split())[:160]}); prepare it once with: "
          f"tfds build {there} --file_format=array_record"
          + (f" --data_dir={data_dir}" if data_dir else "")
      ) from e

  def __len__(self) -> int:
    return len(self._data)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n]."""
    examples = self._data.__getitems__([int(i) for i in indices])
    return dict(
        image=np.stack([e["image"] for e in examples]),
        label=np.array([e["label"] for e in examples], np.int32),
    )
