"""2x downsampling and upsampling with separable filters."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def _separable(x, taps, stride, dilation, padding):
  """Correlates x [B, H, W, C] with taps along H and W, with zero padding."""
  kernel = jnp.asarray(np.outer(taps, taps), x.dtype)[:, :, None, None]
  return jax.lax.conv_general_dilated(
      x,
      jnp.tile(kernel, (1, 1, 1, x.shape[-1])),
      window_strides=(stride, stride),
      padding=[padding] * 2,
      lhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1],
  )


def _unit(taps: Sequence[float]) -> np.ndarray:
  taps = np.asarray(taps, np.float64)
  return taps / taps.sum()


def halve(
    x: jax.Array, taps: Sequence[float] = (1, 1), padding: int | None = None
) -> jax.Array:
  """Downsamples x [B, H, W, C] by 2 with a filter of unit gain.

  Args:
    x: [B, H, W, C].
    taps: an even number of filter taps; (1, 1) is the mean of 2x2 pixels.
    padding: width of the zero padding; None gives an output of H/2 x W/2.
  """
  if len(taps) == 2 and taps[0] == taps[1] and not padding:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
  pad = (len(taps) - 1) // 2 if padding is None else padding
  # A correlation, as in EDM's code; the published taps are symmetric.
  return _separable(x, _unit(taps), 2, 1, (pad, pad))


def double(x: jax.Array, taps: Sequence[float] = (1, 1)) -> jax.Array:
  """Upsamples x [B, H, W, C] by 2 with zero insertion and a filter of gain 4.

  Args:
    x: [B, H, W, C].
    taps: filter taps; (1, 1) is nearest-neighbor upsampling.
  """
  if len(taps) == 2 and taps[0] == taps[1]:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  pad = len(taps) - 1 - (len(taps) - 1) // 2
  flipped = _unit(taps)[::-1] * 2
  return _separable(x, flipped, 1, 2, (pad, pad))


# Resampling of a block by name.
BY_NAME = {None: lambda x: x, "down": halve, "up": double}
