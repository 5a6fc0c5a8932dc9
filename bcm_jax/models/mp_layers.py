"""Magnitude-preserving layers of EDM2.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (2024), section 2 and appendix B; equation numbers refer to this paper.
For inputs of unit magnitude (root mean square 1), the outputs of all functions
have unit expected magnitude.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

_HIGHEST = jax.lax.Precision.HIGHEST
_EPS = 1e-4
# Root mean square of silu(z) for z ~ N(0, 1).
_SILU_RMS = 0.596


def silu(x: jax.Array) -> jax.Array:
  """Magnitude-preserving SiLU, silu(x) / 0.596 (eq. 81)."""
  return nn.silu(x) / _SILU_RMS


def add(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
  """Magnitude-preserving sum of (1 - balance) a and balance b (eq. 88).

  Args:
    a, b: uncorrelated arrays of the same shape and magnitude.
    balance: weight of b, in [0, 1].
  """
  scale = 1 / math.hypot(1 - balance, balance)
  return a * ((1 - balance) * scale) + b * (balance * scale)


def concatenate(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
  """Magnitude-preserving concatenation of channels (eq. 103).

  Scales the inputs so that their contributions to the next layer do not depend
  on their widths.

  Args:
    a: [..., Na].
    b: [..., Nb].
    balance: weight of b, in [0, 1].

  Returns:
    [..., Na + Nb].
  """
  na, nb = a.shape[-1], b.shape[-1]
  scale = math.sqrt(na + nb) / math.hypot(1 - balance, balance)
  return jnp.concatenate(
      [
          a * (scale * (1 - balance) / math.sqrt(na)),
          b * (scale * balance / math.sqrt(nb)),
      ],
      axis=-1,
  )


def unit_kernel(kernel: jax.Array) -> jax.Array:
  """Normalizes a kernel: divides by 1e-4 + RMS per output channel (eq. 47).

  Args:
    kernel: [..., out]; the RMS is over all axes except the last.

  Returns:
    Array of the same shape, at least float32.
  """
  kernel = dtypes.at_least_float32(kernel)
  axes = tuple(range(kernel.ndim - 1))
  square = jnp.mean(kernel**2, axes, keepdims=True)
  return kernel / (_EPS + dtypes.safe_sqrt(square))


def _unit_normal(key, shape, dtype=jnp.float32):
  return unit_kernel(jax.random.normal(key, shape, dtype)).astype(dtype)


class MPConv(nn.Module):
  """Convolution or dense layer with normalized kernels and no bias.

  Computes in the dtype of x. The kernel is normalized in at least float32;
  gradients pass through the normalization and are orthogonal to the kernel.

  Attributes:
    features: number of output channels.
    kernel_size: odd kernel size k with kernel [k, k, in, out]; 0 is a dense
      layer with kernel [in, out].
  """

  features: int
  kernel_size: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
    """Applies the layer to x [B, H, W, C] or [B, C] and scales by `gain`."""
    size = self.kernel_size
    shape = ((size, size) if size else ()) + (x.shape[-1], self.features)
    kernel = self.param("kernel", _unit_normal, shape)
    kernel = unit_kernel(kernel) * (gain / math.sqrt(math.prod(shape[:-1])))
    kernel = kernel.astype(x.dtype)
    if not size:  # Embeddings only: small, so full precision is cheap.
      return jnp.dot(x, kernel, precision=_HIGHEST)
    pad = size // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class MPFourier(nn.Module):
  """Fourier features sqrt(2) cos(freqs c + phases) of unit magnitude (eq. 75).

  freqs = 2 pi N(0, 1) and phases = 2 pi U(0, 1) are constants, see
  embeddings.CONSTANTS.
  """

  num_channels: int

  @nn.compact
  def __call__(self, c_noise: jax.Array) -> jax.Array:
    """Computes features [B, num_channels], at least float32, of c_noise [B]."""

    def constant(name, draw):
      value = self.param(
          name, lambda key: 2 * math.pi * draw(key, (self.num_channels,))
      )
      value = dtypes.at_least_float32(value)
      return jax.lax.stop_gradient(value)

    freqs = constant("freqs", jax.random.normal)
    phases = constant("phases", jax.random.uniform)
    c_noise = dtypes.at_least_float32(c_noise)
    return math.sqrt(2) * jnp.cos(c_noise[:, None] * freqs + phases)
