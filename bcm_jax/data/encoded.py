"""A source of images that are decoded when they are asked for."""

from collections.abc import Callable, Iterable
import dataclasses
import os

from absl import logging
import numpy as np
import tqdm

from bcm_jax import errors
from bcm_jax.data import decoding
from bcm_jax.utils import thread_pool

# Images checked between two movements of the progress bar.
_BLOCK = 512


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
  """A `Source` over image files; see data.source.

  Attributes:
    name: shown in error messages, for example 'folder/train'.
    root: folder or archive that the files lie in.
    files: names within it, in the order of their indices.
    labels: int32 [n]; zeros if there are no classes.
    num_classes: labels lie in [0, num_classes), or None.
    read: file -> its bytes; safe to call from several threads. OSError means
      that it could not be read now, CorruptImage that it never can.
    decoder: bytes -> pixels.
    image_shape: (H, W, C) that every image must have.
    example: path of a file that has this shape, for the error message.
    threads: that decode; None is one a core.
    skipped: files that `without_corrupt` left out.
  """

  name: str
  root: str
  files: tuple[str, ...]
  labels: np.ndarray
  num_classes: int | None
  read: Callable[[str], bytes]
  decoder: decoding.Decoder
  image_shape: tuple[int, int, int]
  example: str
  threads: int | None = None
  skipped: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.files)

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image uint8 [n, H, W, C] and label int32 [n].

    Args:
      indices: integers [n] in [0, len(self)), repeats allowed.

    Raises:
      IndexError: an index outside of that range.
      CorruptImage: names the first file that cannot be decoded.
      UserError: images of several sizes, or a file that cannot be read.
    """
    indices = np.asarray(indices)
    if indices.size and indices.min() < 0:
      raise IndexError(f"{self.name}: negative index {indices.min()}")
    label = self.labels[indices]
    image = np.empty((len(indices), *self.image_shape), np.uint8)

    def decode(k):
      image[k] = self._image(self.files[indices[k]])

    thread_pool.for_each(decode, len(indices), self.threads)
    return dict(image=image, label=label)

  def without_corrupt(self) -> "EncodedSource":
    """Decodes every file once and returns a source of those that can be.

    Raises:
      UserError: no file can be decoded, or images of several sizes.
    """
    intact = np.ones(len(self), bool)
    with tqdm.tqdm(
        total=len(self), unit=" images", desc=f"checking {self.name}"
    ) as bar:
      for start in range(0, len(self), _BLOCK):
        n = min(_BLOCK, len(self) - start)

        def check(k, start=start):
          intact[start + k] = self._is_intact(self.files[start + k])

        thread_pool.for_each(check, n, self.threads)
        bar.update(n)
    kept = tuple(f for f, good in zip(self.files, intact, strict=True) if good)
    skipped = tuple(sorted(set(self.files) - set(kept)))
    self._report(skipped)
    return dataclasses.replace(
        self, files=kept, labels=self.labels[intact], skipped=skipped
    )

  def _report(self, skipped: tuple[str, ...]) -> None:
    if len(skipped) == len(self):
      raise errors.UserError(
          f"{self.name}: none of {len(self)} files in {self.root} can be"
          f" decoded ({skipped[0]} is the first), expected images; check the"
          " path"
      )
    if skipped:
      logging.warning(
          "%s: skipped %d of %d files that cannot be decoded: %s%s",
          self.name, len(skipped), len(self), ", ".join(skipped[:10]),
          ", ..." if len(skipped) > 10 else "",
      )

  def _is_intact(self, file: str) -> bool:
    try:
      self._image(file)
    except decoding.CorruptImage:
      return False
    return True

  def _image(self, file: str) -> np.ndarray:
    path = os.path.join(self.root, file)
    pixels = self.decoder(_content(self.read, file, path), path)
    if pixels.shape != self.image_shape:
      height, width, _ = self.image_shape
      raise errors.UserError(
          f"{self.name}: {self.example} is {height}x{width} (height x width)"
          f" and {path} is {pixels.shape[0]}x{pixels.shape[1]}, expected images"
          " of one size; set --size / data.size to make them so"
      )
    return pixels


def first_shape(
    root: str,
    files: Iterable[str],
    read: Callable[[str], bytes],
    decoder: decoding.Decoder,
    skip_corrupt: bool,
) -> tuple[tuple[int, int, int], str]:
  """Returns the (H, W, C) of the first image, from its header, and its path.

  Args:
    root, read, decoder: as in `EncodedSource`.
    files: at least one; read up to the first that is an image.
    skip_corrupt: look further where a header is damaged.

  Raises:
    CorruptImage: the first file (with `skip_corrupt`: every one) is damaged.
  """
  failure = None
  for file in files:
    path = os.path.join(root, file)
    try:
      return decoder.shape(_content(read, file, path), path), path
    except decoding.CorruptImage as e:
      failure = failure or e
      if not skip_corrupt:
        break
  raise failure


def _content(read: Callable[[str], bytes], file: str, path: str) -> bytes:
  try:
    return read(file)
  except OSError as e:
    raise errors.UserError(
        f"{path} cannot be read ({type(e).__name__}: {e.strerror or e}); check"
        " the file and its permissions, and run again"
    ) from e
