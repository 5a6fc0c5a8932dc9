"""Layers that keep the expected magnitude of what passes through them.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (EDM2, 2024), section 2 and appendix B, whose equations are cited. For
inputs of unit magnitude (root mean square 1) every function here gives outputs
of unit magnitude.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from bcm_jax.models import dtypes

_HIGHEST = jax.lax.Precision.HIGHEST
_EPS = 1e-4
# Root mean square of silu(z), z ~ N(0, 1).
_SILU_RMS = 0.596


def silu(x: jax.Array) -> jax.Array:
  """silu(x) / 0.596, which keeps the magnitude of normal x (eq. 81)."""
  return nn.silu(x) / _SILU_RMS


def add(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
  """(1 - balance) a + balance b, rescaled to keep the magnitude (eq. 88).

  Args:
    a, b: arrays of one shape, uncorrelated and of one magnitude.
    balance: share of b, in [0, 1].
  """
  scale = 1 / math.hypot(1 - balance, balance)
  return a * ((1 - balance) * scale) + b * (balance * scale)


def concatenate(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
  """Joins channels so that b weighs `balance` whatever the widths (eq. 103).

  Args:
    a: [..., Na].
    b: [..., Nb].
    balance: share of b in what follows, in [0, 1].

  Returns:
    [..., Na + Nb] of the magnitude of its parts.
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
  """Divides a kernel by 1e-4 + its RMS, an output channel at a time (eq. 47).

  Args:
    kernel: [..., out]; the norm is over all axes but the last.

  Returns:
    The same shape, float32 or wider.
  """
  wide = dtypes.at_least_float32(kernel)
  axes = tuple(range(kernel.ndim - 1))
  return wide / (_EPS + jnp.sqrt(jnp.mean(wide**2, axes, keepdims=True)))


def _unit_normal(key, shape, dtype=jnp.float32):
  return unit_kernel(jax.random.normal(key, shape, dtype)).astype(dtype)


class MPConv(nn.Module):
  """Convolution or dense layer of unit-length kernels, without a bias.

  Computed in the dtype of x; the kernel is normalised in float32 or wider, and
  gradients pass through the norm, so they are orthogonal to the kernel.

  Attributes:
    features: output channels.
    kernel_size: sides of the kernel, odd; 0 is a dense layer. A kernel is
      [k, k, in, out] or [in, out], for k = 1 too.
  """

  features: int
  kernel_size: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
    """x [B, H, W, C] or [B, C] -> the same with `features` channels."""
    size = self.kernel_size
    shape = ((size, size) if size else ()) + (x.shape[-1], self.features)
    kernel = self.param("kernel", _unit_normal, shape)
    kernel = unit_kernel(kernel) * (gain / math.sqrt(math.prod(shape[:-1])))
    kernel = kernel.astype(x.dtype)
    if not size:  # Embeddings only: small, and not to be rounded.
      return jnp.dot(x, kernel, precision=_HIGHEST)
    pad = size // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class MPFourier(nn.Module):
  """sqrt(2) cos(freqs c + phases): random features of unit magnitude (eq. 75).

  freqs = 2 pi N(0, 1) and phases = 2 pi U(0, 1) are constants. They are kept
  among the parameters, for checkpoints must hold them, but get no gradient.
  """

  num_channels: int

  @nn.compact
  def __call__(self, c_noise: jax.Array) -> jax.Array:
    """[B] -> [B, num_channels], float32 or wider."""

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
