"""Small networks and closed forms that the tests of losses share."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import preconditioning
from bcm_jax.methods import base
from bcm_jax.methods import bcm
from bcm_jax.methods import consistency
from bcm_jax.methods import edm
from bcm_jax.models import layers
from bcm_jax.training import rng

SIGMA_DATA = 0.5
# A config's smallest ADM: the middle and one block of the decoder.
TINY = {
    "model.model_channels": "8", "model.num_groups": "4",
    "model.num_head_channels": "8", "model.channel_mult": "1,",
    "model.num_res_blocks": "0",
}


@contextlib.contextmanager
def optimized():
  """Compiles with all of XLA's optimizations, for programs that run long."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


class MLP(nn.Module):
  """A network with ADM's signature for images of few pixels.

  Times come in as ln(t)/2, made of ADM's 250 ln t. With harmonics of it the
  network would guess how to jump upwards without being taught to.
  """

  width: int = 16
  depth: int = 2
  two_time: bool = True
  dropout: float = 0.0
  num_classes: int | None = None

  @nn.compact
  def __call__(
      self, x, c_noise, c_noise_end=None, labels=None, dropout_keys=None
  ):
    assert self.two_time == (c_noise_end is not None)
    times = [c_noise] + ([c_noise_end] if self.two_time else [])
    logs = jnp.stack(times, -1) / 500
    parts = [x.reshape(x.shape[0], -1), logs]
    if self.num_classes is not None:
      parts.append(jax.nn.one_hot(labels, self.num_classes))
    h = jnp.concatenate(parts, -1)
    for i in range(self.depth):
      h = nn.silu(nn.Dense(self.width, name=f"hidden_{i}")(h))
      h = layers.Dropout(self.dropout, name=f"dropout_{i}")(h, dropout_keys)
    out = nn.Dense(int(np.prod(x.shape[1:])), name="out")(h)
    return out.reshape(x.shape)


class GaussianFlow(nn.Module):
  """F* of core_bcm: the exact flow map of N(0, sigma_data^2 I) images.

  `scale` is a parameter, 1 for the exact map, so that there is something to
  train.
  """

  two_time: bool = True

  @staticmethod
  def last_layer(tree):
    """What stands for a convolution near the output."""
    return tree["scale"]

  @nn.compact
  def __call__(
      self, x, c_noise, c_noise_end, labels=None, dropout_keys=None
  ):
    del labels, dropout_keys
    scale = self.param("scale", nn.initializers.ones, ())
    t, u = (
        jnp.exp(c / 250).reshape(-1, *[1] * (x.ndim - 1))
        for c in (c_noise, c_noise_end)
    )
    sd = SIGMA_DATA
    root = jnp.sqrt((t**2 + sd**2) * (u**2 + sd**2))
    return scale * x * sd * (t - u) / (root + t * u + sd**2)


class GaussianDenoiser(nn.Module):
  """F = scale x; 0, the start, is the optimum for N(0, sigma_data^2 I)."""

  two_time: bool = False
  num_classes: int | None = None

  @nn.compact
  def __call__(
      self, x, c_noise, c_noise_end=None, labels=None, dropout_keys=None
  ):
    assert c_noise_end is None
    scale = self.param("scale", nn.initializers.zeros, ())
    for level in range(2):
      layers.sow_level(self, level, x[:, :: level + 1, :: level + 1])
    return scale * x


def gaussian_teacher(**options):
  """(Diffusion with the exact denoiser of such images, its parameters)."""
  method = edm.Diffusion(GaussianDenoiser(), **options)
  return method, {"scale": jnp.zeros(())}


class Scale(nn.Module):
  """w x of one parameter."""

  start: float = 1.0

  @nn.compact
  def __call__(self, x):
    return self.param("w", nn.initializers.constant(self.start), ()) * x


def scale_network(start=1.0) -> base.TrainableNetwork:
  """A network of that one parameter."""
  network = Scale(start)
  return base.TrainableNetwork(
      network, lambda key, x, y: network.init(key, x)["params"]
  )


def exact_flow(x, t, u):
  """Phi(x, t, u) of N(0, sigma_data^2) data."""
  sd = SIGMA_DATA
  return np.sqrt((sd**2 + u**2) / (sd**2 + t**2)) * x


def context(
    images,
    curriculum=None,
    labels=None,
    averages=None,
    networks=None,
    seed=0,
    step=0,
    index=None,
    frozen=None,
    extra=None,
) -> base.Context:
  """What the engine would hand to a loss at a step."""
  index = np.arange(len(images)) if index is None else index

  def keys(stream):
    return rng.example_keys(seed, stream, step, index)

  return base.Context(
      images, labels, keys, curriculum or {}, networks or {}, averages or {},
      index=jnp.asarray(index), frozen=frozen or {}, extra=extra or {},
      shared_key=lambda stream: rng.step_key(seed, stream, step),
  )


def _asarray(x):
  """Float64 where x64 is on, else float32."""
  return jnp.asarray(x, jnp.result_type(float))


def at_times(cls, t, r, u=None):
  """A subclass of a method whose draws of times are these [B] arrays."""

  class Fixed(cls):
    def sample_times(self, ctx):
      index = jnp.zeros(t.shape, jnp.int32)
      return consistency.Times(_asarray(t), _asarray(r), index)

    def sample_end(self, ctx, index):
      return _asarray(u)

  return Fixed


def bidirectional_toy(network=None, **options):
  """BCM on few pixels, with a short curriculum."""
  settings = dict(
      network=network or MLP(), c_noise=preconditioning.adm_c_noise,
      s0=10, s1=40, curriculum_steps=30,
  )
  return bcm.BidirectionalTraining(**(settings | options))


def consistency_toy(network=None, **options):
  """CM on few pixels, one-time unless the network says otherwise."""
  settings = dict(
      network=network or MLP(two_time=False),
      c_noise=preconditioning.adm_c_noise,
      s0=10, s1=40, curriculum_steps=30,
  )
  return consistency.ConsistencyTraining(**(settings | options))


def parameters(method, images, labels=None):
  """Fresh parameters of a method's only network."""
  return jax.jit(method.init)(jax.random.key(1), images, labels)


@functools.cache
def images(batch: int = 8, pixels: int = 2, seed: int = 0):
  """[batch, pixels, pixels, 1] images with spread sigma_data."""
  rng_ = np.random.default_rng(seed)
  shape = (batch, pixels, pixels, 1)
  return np.float32(SIGMA_DATA * rng_.standard_normal(shape))


def assert_equal(a, b) -> None:
  """Asserts that two trees are equal bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def rounding(terms: int) -> float:
  """Returns a bound of the relative error of float32 sums of so many terms."""
  return terms * 2.0**-24


def assert_close(a, b, rtol=1e-5) -> None:
  """Asserts that two trees agree to rtol of each leaf's largest value.

  So the tolerance does not depend on the scale of the values, nor on where a
  processor rounds.
  """
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(
        x, y, rtol=rtol, atol=rtol * float(np.max(np.abs(y)))
    )
