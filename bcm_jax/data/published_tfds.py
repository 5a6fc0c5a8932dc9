"""CIFAR-10, ImageNet-64 and ImageNet through TFDS.

Importing this module requires TensorFlow Datasets; opening a dataset requires
files prepared as array_record, for random access. Images are decoded by
`decoding.Decoder`, not by TensorFlow, as for every other source.
"""

import numpy as np
import tensorflow_datasets as tfds

from bcm_jax import errors
from bcm_jax.data import decoding
from bcm_jax.utils import thread_pool

# data.name -> (TFDS name, {split: TFDS split}).
NAMES = {
    "cifar10": ("cifar10", {"train": "train", "test": "test"}),
    "imagenet64": (
        "imagenet_resized/64x64", {"train": "train", "test": "validation"}
    ),
    "imagenet2012": (
        "imagenet2012", {"train": "train", "test": "validation"}
    ),
}


class TFDSSource:
  """An `image_source.Source` of a prepared TFDS dataset.

  Args:
    name: key of NAMES.
    split: 'train' or 'test'.
    num_classes: number of classes.
    decoder: decodes the images; `size` must be set.
    data_dir: TFDS folder; None uses TFDS's default.
    threads: number of decoding threads; None: one per core.

  Raises:
    UserError: unknown split, or no prepared copy with random access.
  """

  def __init__(
      self,
      name: str,
      split: str,
      num_classes: int,
      decoder: decoding.Decoder,
      data_dir: str | None = None,
      threads: int | None = None,
  ):
    tfds_name, splits = NAMES[name]
    if split not in splits:
      raise errors.unknown_name(f"split of {name}", split, splits)
    self.name = f"{name}/{split}"
    self.image_shape = (decoder.size, decoder.size, decoder.channels)
    self.num_classes = num_classes
    self._decoder, self._threads = decoder, threads
    try:
      builder = tfds.builder(tfds_name, data_dir=data_dir)
      self._data = builder.as_data_source(
          splits[split], decoders={"image": tfds.decode.SkipDecoding()}
      )
    except Exception as e:  # TFDS raises many types for missing files.
      raise errors.UserError(
          f"{self.name}: cannot be read ({type(e).__name__}: "
          f"{' '.join(str(e).split())[:160]}); prepare it once with: "
          f"tfds build {tfds_name} --file_format=array_record"
          + (f" --data_dir={data_dir}" if data_dir else "")
      ) from e

  def __len__(self) -> int:
    return len(self._data)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    Args:
      indices: integers [n] in [0, len(self)), repeats allowed.

    Raises:
      IndexError: an index is out of range.
      UserError: an image cannot be decoded.
    """
    indices = [int(i) for i in indices]
    if any(not 0 <= i < len(self) for i in indices):
      raise IndexError(f"{self.name}: expected indices 0 to {len(self) - 1}")
    examples = self._data.__getitems__(indices) if indices else []
    image = np.empty((len(indices), *self.image_shape), np.uint8)

    def decode(k):
      file = f"{self.name}: example {indices[k]}"
      image[k] = self._decoder(examples[k]["image"], file)

    thread_pool.for_each(decode, len(indices), self._threads)
    return dict(
        image=image, label=np.array([e["label"] for e in examples], np.int32)
    )
