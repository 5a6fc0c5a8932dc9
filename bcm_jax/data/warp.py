"""Image resampling at arbitrary points with wavelet anti-aliasing.

Upsamples by 2, interpolates bilinearly and downsamples by 2 (Karras et al.,
"Training Generative Adversarial Networks with Limited Data", 2020, appendix B).
Both changes of resolution use the low-pass filter of an orthogonal wavelet, so
that the identity map reproduces the image.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

Margin = tuple[tuple[int, int], tuple[int, int]]
Sources = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Decomposition low-pass filter of the symlet with six vanishing moments
# (Daubechies, "Ten Lectures on Wavelets", 1992, section 8.1), as printed by
# PyWavelets for Wavelet("sym6").dec_lo. The taps sum to sqrt(2).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057,
    -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564,
    0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)
_TAPS = len(SYM6)
# Rounded to float32 as in the official code, to match it in float64 too.
_FILTER = np.float32(SYM6).astype(np.float64)
REACH = _TAPS // 4  # Radius of one filter pass, in pixels.


@functools.cache
def _upsampling(size: int, low: int, high: int) -> np.ndarray:
  """Returns a matrix for reflection padding, 2x upsampling and a zero border.

  Args:
    size: number of pixels along the axis.
    low, high: widths of the reflection padding in pixels.

  Returns:
    float64 [2 * (low + size + high) + 2, size].
  """
  if not 0 <= min(low, high) <= max(low, high) < size:
    raise ValueError(f"margin: got {low}, {high}, expected 0 to {size - 1}")
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
  """Returns the 2x downsampling matrix, float64 [size, 2 * size + 10]."""
  matrix = np.zeros((size, 2 * size + _TAPS - 2))
  for row in range(size):
    matrix[row, 2 * row : 2 * row + _TAPS] = _FILTER
  matrix.setflags(write=False)
  return matrix


def _along_axes(rows: np.ndarray, columns: np.ndarray, images) -> jax.Array:
  """Applies one matrix along the height and another along the width."""
  rows = jnp.asarray(rows, images.dtype)
  columns = jnp.asarray(columns, images.dtype)
  images = jnp.einsum("yh,bhwc->bywc", rows, images, precision="highest")
  return jnp.einsum("xw,bywc->byxc", columns, images, precision="highest")


def _bilinear(images, x, y) -> jax.Array:
  """Interpolates images at indices x, y [B, n, m]; extends the zero border.

  Returns:
    [B, n, m, C].
  """

  def cell(position, size):
    position = jnp.clip(position, 0, size - 1)
    first = jnp.minimum(jnp.floor(position), size - 2)
    return first.astype(jnp.int32), (position - first)[..., None]

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
  """Resamples images at the points returned by `sources`.

  Args:
    images: [B, H, W, C], floating point.
    sources: maps output coordinates (x, y), which broadcast to [n, m], to
      source coordinates, each [B, n, m]. In pixels, with the origin at the
      image center, x to the right and y down.
    margin: ((top, bottom), (left, right)), the width of the reflection padding
      in pixels; at most (and by default) H - 1 and W - 1. Pixels beyond are 0.

  Returns:
    Array with the shape and dtype of `images`.

  Raises:
    ValueError: the margin is out of range.
  """
  height, width = images.shape[1:3]
  if margin is None:
    margin = ((height - 1,) * 2, (width - 1,) * 2)
  (top, bottom), (left, right) = margin

  def points(size):
    # The points of the 2x grid that the downsampling filter reads.
    half = (np.arange(2 * size + _TAPS - 2) - size - _TAPS // 2 + 2) / 2
    return jnp.asarray(half, images.dtype)

  x, y = sources(points(width), points(height)[:, None])
  fine = _along_axes(
      _upsampling(height, top, bottom), _upsampling(width, left, right), images
  )
  # Points are multiples of 1/2, so the identity map gives exact integers.
  x, y = 2 * x + (width + 2 * left), 2 * y + (height + 2 * top)
  fine = _bilinear(fine, x, y)
  return _along_axes(_downsampling(height), _downsampling(width), fine)
