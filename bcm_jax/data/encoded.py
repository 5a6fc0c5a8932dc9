"""Image source that decodes files on access."""

from collections.abc import Callable, Iterable
import dataclasses
import os

from absl import logging
import numpy as np
import tqdm

from bcm_jax import errors
from bcm_jax.data import decoding
from bcm_jax.utils import thread_pool

# Images checked per update of the progress bar.
_BLOCK = 512


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
  """An `image_source.Source` of encoded image files.

  Attributes:
    name: name for error messages, for example 'folder/train'.
    root: folder or archive of the files.
    files: file names relative to `root`; example i is files[i].
    labels: int32 [n]; zeros without labels.
    num_classes: labels are in [0, num_classes); None without labels.
    read: file name -> bytes; thread-safe. Raises OSError for a temporary
      failure and CorruptImage for a permanent one.
    decoder: bytes -> pixels.
    image_shape: (H, W, C) that every image must have.
    example: path of a file with this shape, for error messages.
    threads: number of decoding threads; None: one per core.
    skipped: files skipped by `without_corrupt`.
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
      IndexError: an index is out of range.
      CorruptImage: a file cannot be decoded; names the first one.
      UserError: an image has another size, or a file cannot be read.
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
    """Decodes every file once and returns a source of the intact ones.

    Raises:
      UserError: no file can be decoded, or the images differ in size.
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
    files = tuple(f for f, good in zip(self.files, intact, strict=True) if good)
    skipped = tuple(sorted(set(self.files) - set(files)))
    self._report(skipped)
    return dataclasses.replace(
        self, files=files, labels=self.labels[intact], skipped=skipped
    )

  def _report(self, skipped: tuple[str, ...]) -> None:
    if len(skipped) == len(self):
      raise errors.UserError(
          f"{self.name}: got {len(self)} files in {self.root} that cannot be"
          f" decoded (first: {skipped[0]}), expected images; check data.path"
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
          f"{self.name}: got {path} of {pixels.shape[0]}x{pixels.shape[1]}"
          f" (height x width), expected {height}x{width} as {self.example}; set"
          " --size / data.size to resize all images"
      )
    return pixels


def first_shape(
    root: str,
    files: Iterable[str],
    read: Callable[[str], bytes],
    decoder: decoding.Decoder,
    skip_corrupt: bool,
) -> tuple[tuple[int, int, int], str]:
  """Returns the shape (H, W, C) of the first image, and its path.

  Args:
    root, read, decoder: see `EncodedSource`.
    files: one or more file names; only the header of an image is decoded.
    skip_corrupt: continue with the next file if a header is corrupt.

  Raises:
    CorruptImage: the first file (with `skip_corrupt`: every file) is corrupt.
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
        f"{path}: cannot be read ({type(e).__name__}: {e.strerror or e}); check"
        " the file and its permissions, and run again"
    ) from e
