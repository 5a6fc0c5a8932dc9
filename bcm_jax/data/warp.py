"""Images resampled at any points: doubled, read bilinearly, and halved again.

The procedure of Karras et al., "Training Generative Adversarial Networks with
Limited Data" (2020), appendix B. Both changes of resolution go through the
low-pass of an orthogonal wavelet, so that an image read at its own pixels
comes back unchanged.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

Margin = tuple[tuple[int, int], tuple[int, int]]
Sources = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Decomposition low-pass of the symlet with six vanishing moments (Daubechies,
# "Ten Lectures on Wavelets", 1992, section 8.1), with the digits that
# PyWavelets prints for Wavelet("sym6").dec_lo. They sum to sqrt(2).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057,
    -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564,
    0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)
_TAPS = len(SYM6)
# Rounded as in the official code, so that float64 agrees with it too.
_FILTER = np.float32(SYM6).astype(np.float64)
REACH = _TAPS // 4  # Of one pass to either side, in pixels.


@functools.cache
def _upsampling(size: int, low: int, high: int) -> np.ndarray:
  """Reflected margins, twofold upsampling and a border of zeros in one matrix.

  Returns:
    float64 [2 * (low + size + high) + 2, size].
  """
  if not 0 <= min(low, high) <= max(low, high) < size:
    raise ValueError(f"margins {low}, {high}, expected 0 to {size - 1}")
  padded = np.arange(-low, size + high)
  origin = size - 1 - np.abs(size - 1 - np.abs(padded))
  matrix = np.zeros((2 * padded.size + 2, size))
  row, column = np.indices((2 * padded.size, padded.size))
  tap = row - 2 * column + _TAPS // 2 - 1
  used = (tap >= 0) & (tap < _TAPS)
  np.add.at(matrix, (row[used] + 1, origin[column[used]]), _FILTER[tap[used]])
  matrix.setflags(write=False)
  return matrix


@functools.cache
def _downsampling(size: int) -> np.ndarray:
  """Twofold downsampling: float64 [size, 2 * size + 10]."""
  matrix = np.zeros((size, 2 * size + _TAPS - 2))
  for row in range(size):
    matrix[row, 2 * row : 2 * row + _TAPS] = _FILTER
  matrix.setflags(write=False)
  return matrix


def _along_axes(rows: np.ndarray, columns: np.ndarray, images) -> jax.Array:
  """Applies a matrix along the height and another along the width."""
  rows = jnp.asarray(rows, images.dtype)
  columns = jnp.asarray(columns, images.dtype)
  images = jnp.einsum("yh,bhwc->bywc", rows, images, precision="highest")
  return jnp.einsum("xw,bywc->byxc", columns, images, precision="highest")


def _bilinear(images, x, y) -> jax.Array:
  """Values [B, n, m, C] at indices x, y [B, n, m]; the border, 0, goes on."""

  def cell(at, size):
    at = jnp.clip(at, 0, size - 1)
    first = jnp.minimum(jnp.floor(at), size - 2)
    return first.astype(jnp.int32), (at - first)[..., None]

  batch, height, width, channels = images.shape
  x, right = cell(x, width)
  y, down = cell(y, height)
  flat = images.reshape(batch, -1, channels)

  @jax.vmap
  def take(pixels, index):
    return pixels.at[index].get(mode="clip")

  first = y * width + x
  above = take(flat, first) * (1 - right) + take(flat, first + 1) * right
  first += width
  below = take(flat, first) * (1 - right) + take(flat, first + 1) * right
  return above * (1 - down) + below * down


def resample(
    images: jax.Array, sources: Sources, margin: Margin | None = None
) -> jax.Array:
  """Reads images at the points that `sources` names.

  Args:
    images: [B, H, W, C], floating point.
    sources: points (x, y) of the result, broadcasting to [n, m], to the points
      of the images that they come from, each [B, n, m]. In pixels, with the
      origin at the centre, x to the right and y down.
    margin: ((top, bottom), (left, right)), the pixels that are reflected
      around the images, at most H - 1 and W - 1, which is the default. Beyond
      them is 0.

  Returns:
    Like the images.

  Raises:
    ValueError: for a margin out of range.
  """
  height, width = images.shape[1:3]
  if margin is None:
    margin = ((height - 1,) * 2, (width - 1,) * 2)
  (top, bottom), (left, right) = margin

  def points(size):
    # Those of the doubled grid that the downsampling reads.
    half = (np.arange(2 * size + _TAPS - 2) - size - _TAPS // 2 + 2) / 2
    return jnp.asarray(half, images.dtype)

  x, y = sources(points(width), points(height)[:, None])
  fine = _along_axes(
      _upsampling(height, top, bottom), _upsampling(width, left, right), images
  )
  # Halves doubled are whole: indices of an untouched image have no rounding.
  x, y = 2 * x + (width + 2 * left), 2 * y + (height + 2 * top)
  fine = _bilinear(fine, x, y)
  return _along_axes(_downsampling(height), _downsampling(width), fine)
