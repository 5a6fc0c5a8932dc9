"""EDM2's network: sizes, magnitudes, classes, dropout, precision, errors.

The published networks are never allocated, only their shapes are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import edm2
from bcm_jax.models import mp_layers
from tests import quick

TINY = dict(
    model_channels=16, out_channels=2, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), num_head_channels=8, num_classes=3,
    logvar_channels=8,
)
# Parameters by model_channels: XXS to XXL on ImageNet-64, then on CIFAR-10.
IMAGENET = dict(num_classes=1000), 64, {
    64: 31_307_877, 128: 124_710_949, 192: 280_209_381, 256: 497_803_173,
    320: 777_492_325, 384: 1_119_276_837, 448: 1_523_156_709,
}
CIFAR = dict(num_classes=10, channel_mult=(1, 2, 2)), 32, {
    64: 9_155_932, 128: 36_612_636, 192: 82_370_268,
}


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rms(x, axis=None):
  return np.sqrt((np.asarray(x, np.float64) ** 2).mean(axis))


def shapes(net, size=64, **changes):
  """Parameter shapes of a network, without making one."""
  args = dict(labels=jnp.zeros(1, jnp.int32)) | changes
  x = jnp.ones((1, size, size, net.out_channels))
  return jax.eval_shape(
      lambda: net.init(jax.random.key(0), x, jnp.ones(1), **args)
  )["params"]


def name_of(path):
  return "/".join(part.key for part in path)


def leaves(params):
  return {
      name_of(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@pytest.mark.slow
@pytest.mark.parametrize("settings, size, published", [IMAGENET, CIFAR],
                         ids=["imagenet", "cifar"])
def test_published_sizes(settings, size, published):
  counted = {}
  for width in (64, 192):
    found = leaves(shapes(edm2.EDM2(model_channels=width, **settings), size))
    constants = {k for k in found if k.endswith(("freqs", "phases"))}
    assert sum(found[k].size for k in constants) == 2 * width + 2 * 128
    assert {v.dtype for v in found.values()} == {np.dtype("float32")}
    # The published counts leave constants out.
    counted[width] = sum(
        v.size for k, v in found.items() if k not in constants
    )
    # All else grows with the width.
    counted[0] = found["logvar_linear/kernel"].size + sum(
        k.endswith("gain") for k in found
    )
  # Every kernel is affine in the width on both sides: three widths tell all.
  parabola = np.polyfit(list(counted), list(counted.values()), 2)
  for width, count in published.items():
    assert round(np.polyval(parabola, width)) == count
    assert counted.get(width, count) == count


@pytest.mark.parametrize(
  "operation",
  [
    lambda k: mp_layers.silu(normal(k, 200_000)),
    lambda k: mp_layers.add(normal(k, 200_000), normal(k + 9, 200_000), 0.3),
    lambda k: mp_layers.concatenate(
      normal(k, 4000, 40), normal(k + 9, 4000, 10), 0.2
    ),
    lambda k: module(mp_layers.MPConv(300), normal(k, 300, 200)),
    lambda k: module(mp_layers.MPConv(100, 1), normal(k, 20, 4, 4, 100)),
    # 3x3 at inner pixels: zeros come in at the border.
    lambda k: module(mp_layers.MPConv(100, 3), normal(k, 20, 8, 8, 40))[
      :, 1:-1, 1:-1
    ],
    lambda k: module(mp_layers.MPFourier(500), normal(k, 300)),
  ],
  ids=["silu", "add", "concatenate", "dense", "conv1", "conv3", "fourier"],
)
def test_operations_preserve_magnitude(operation):
  assert rms(operation(1)) == pytest.approx(1, abs=0.02)


def module(layer, x):
  return quick.jit(
    lambda: layer.init_with_output(jax.random.key(0, impl="unsafe_rbg"), x)[0]
  )()


def test_balances_are_shares():
  a, b = normal(0, 5, 4), normal(1, 5, 12)
  joined = mp_layers.concatenate(a, b, 0.2)
  # Of the squared magnitude of what follows, whatever the widths.
  first, second = (
    np.sum(np.square(part), axis=-1)
    / np.sum(np.square(whole), axis=-1)
    * whole.shape[-1]
    for part, whole in ((joined[:, :4], a), (joined[:, 4:], b))
  )
  np.testing.assert_allclose(second / first, (0.2 / 0.8) ** 2, rtol=1e-5)
  total = mp_layers.add(jnp.float32(1), jnp.float32(0), 0.2)
  assert total == pytest.approx(0.8 / np.hypot(0.8, 0.2))
  assert mp_layers.add(jnp.float32(3), jnp.float32(5), 0.0) == 3
  assert mp_layers.add(jnp.float32(3), jnp.float32(5), 1.0) == 5


def random_kernels(shaped):
  """Numbers for shapes of parameters; gains, the scalars, are 0."""
  seeds = iter(range(100))

  def draw(leaf):
    if not leaf.ndim:
      return np.float32(0)
    out = normal(next(seeds), *leaf.shape)
    return out / rms(out, tuple(range(leaf.ndim - 1))).astype(np.float32)

  return jax.tree.map(draw, shaped)


def run(net):
  """f(params, x, c_noise, labels, dropout_keys), compiled."""
  return quick.jit(
    lambda p, x, c, y, keys: net.apply({"params": p}, x, c, None, y, keys)
  )


@pytest.fixture(scope="module")
def tiny():
  """(network, its `run`, its fresh parameters, the same with large gains).

  Kernels are drawn by NumPy, for JAX is slow to compile; gains are its own.
  """
  net = edm2.EDM2(**TINY, dropout=0.4)
  x, c, y = inputs()

  drawn = random_kernels(shapes(net, 4))

  def gains():
    found = leaves(net.init(jax.random.key(0), x, c, labels=y)["params"])
    return {k: v for k, v in found.items() if k.endswith("gain")}

  known = quick.jit(gains)()
  fresh = jax.tree_util.tree_map_with_path(
    lambda path, leaf: known.get(name_of(path), leaf), drawn
  )

  def awake(path, leaf):
    return np.float32({"out_gain": 1, "emb_gain": 2}.get(path[-1].key, leaf))

  return net, run(net), fresh, jax.tree_util.tree_map_with_path(awake, fresh)


def inputs(size=4):
  labels = np.array([0, 1, 2, 1], np.int32)
  return normal(0, 4, size, size, 2), normal(1, 4), labels


def test_a_fresh_network_is_zero(tiny):
  _, apply, fresh, _ = tiny
  gains = {k for k in leaves(fresh) if k.endswith("gain")}
  assert len(gains) == 6 and not any(leaves(fresh)[k] for k in gains)
  assert not apply(fresh, *inputs(), None).any()


def test_levels_and_classes_are_unseen_until_their_gain_wakes(tiny):
  _, apply, fresh, gains = tiny
  x, c, y = inputs()
  asleep = fresh | {"out_gain": np.float32(1)}
  out = apply(asleep, x, c, y, None)
  assert out.any()
  np.testing.assert_array_equal(apply(asleep, x, -c, y[::-1], None), out)
  out = apply(gains, x, c, y, None)
  for other in (apply(gains, x, -c, y, None), apply(gains, x, c, 2 - y, None)):
    assert np.abs(other - out).max() > 1e-2


def test_network_preserves_magnitude():
  net = edm2.EDM2(**TINY | dict(model_channels=64, num_head_channels=128))
  x, c, y = inputs(8)
  params = random_kernels(shapes(net, 8))
  # As a fresh network gives 0, look inside. Attention is left out, for a mean
  # of uncorrelated values is smaller than they are.
  _, seen = quick.jit(
    lambda p: net.apply(
      {"params": p},
      x,
      c,
      labels=y,
      mutable=True,
      capture_intermediates=lambda m, _: isinstance(m, edm2.Block),
    )
  )(params)
  blocks = {
    k: rms(v["__call__"][0])
    for k, v in seen["intermediates"].items()
    if "__call__" in v
  }
  assert len(blocks) == 5
  for name, size in blocks.items():  # Zeros come in at the borders.
    assert 0.85 < size < 1.1, (name, size)


def test_forced_normalisation(tiny):
  _, apply, _, gains = tiny
  rng = np.random.default_rng(0)

  def grow(path, leaf):  # Every output channel by a factor of its own.
    if path[-1].key != "kernel":
      return leaf
    return leaf * rng.uniform(0.2, 7, leaf.shape[-1]).astype(np.float32)

  grown = jax.tree_util.tree_map_with_path(grow, gains)
  projected = quick.jit(edm2.normalize_weights)(grown)
  assert jax.tree.structure(projected) == jax.tree.structure(grown)
  kernels = {k for k in leaves(grown) if k.endswith("/kernel")}
  assert {
    "logvar_linear/kernel",
    "emb_noise/kernel",
    "emb_label/kernel",
    "out_conv/kernel",
    "enc_4x4_conv/kernel",
  } < kernels
  for name, leaf in leaves(projected).items():
    before = leaves(grown)[name]
    assert leaf.dtype == before.dtype
    if name in kernels:
      each = rms(leaf, tuple(range(leaf.ndim - 1)))
      np.testing.assert_allclose(each, 1, atol=1e-3, err_msg=name)
      assert not np.allclose(leaf, before)
    else:
      np.testing.assert_array_equal(leaf, before, err_msg=name)
  out = apply(grown, *inputs(), None)
  # Up to the 1e-4 in the norm, of which rows of 0.2 feel five times as much.
  np.testing.assert_allclose(
    apply(projected, *inputs(), None), out, atol=2e-3 * np.abs(out).max()
  )
  np.testing.assert_allclose(
    apply(gains, *inputs(), None), out, atol=2e-3 * np.abs(out).max()
  )


@pytest.mark.parametrize(
  "layer, shape",
  [
    (mp_layers.MPConv(7), (2, 30)),
    (mp_layers.MPConv(5, 3), (1, 2, 2, 6)),
  ],
)
def test_fresh_kernels_are_normalised(layer, shape):
  key = jax.random.key(0, impl="unsafe_rbg")
  params = quick.jit(lambda: layer.init(key, jnp.ones(shape)))()
  kernel = params["params"]["kernel"]
  each = rms(kernel, tuple(range(kernel.ndim - 1)))
  np.testing.assert_allclose(each, 1, atol=2e-4)
  assert np.abs(kernel).max() > 1.5


def test_classes_by_number_by_weight_and_none(tiny):
  _, apply, _, gains = tiny
  x, c, y = inputs()
  one_hot = np.eye(3, dtype=np.float32)[y]

  def by_weight(weights):
    return apply(gains, x, c, weights, None)

  close = dict(rtol=0, atol=1e-5)
  out = apply(gains, x, c, y, None)
  np.testing.assert_allclose(by_weight(one_hot), out, **close)
  none = apply(gains, x, c, np.array([-1, 1, -1, -1], np.int32), None)
  one_hot[[0, 2, 3]] = 0
  np.testing.assert_allclose(by_weight(one_hot), none, **close)
  np.testing.assert_allclose(none[1], out[1], **close)
  for i in (0, 2, 3):
    assert np.abs(none[i] - out[i]).max() > 1e-2


@pytest.mark.slow
def test_dropout_is_keyed_by_example(tiny):
  _, apply, _, gains = tiny
  same = [np.repeat(v[:1], 4, axis=0) for v in inputs()]
  keys = jax.random.split(jax.random.key(3), 2)[jnp.array([0, 1, 0, 0])]
  a, b, c, d = apply(gains, *same, keys)
  np.testing.assert_allclose(a, c, rtol=0, atol=1e-6)
  np.testing.assert_allclose(a, d, rtol=0, atol=1e-6)
  assert np.abs(a - b).max() > 1e-2
  without = apply(gains, *same, None)
  assert np.abs(without[0] - a).max() > 1e-2
  np.testing.assert_allclose(without[0], without[1], rtol=0, atol=1e-6)


def test_activations_are_clipped():
  x, emb = 100 * normal(0, 1, 2, 2, 4), normal(1, 1, 4)

  block = edm2.Block(4, decoder=True, clip_act=None)
  params = random_kernels(
    jax.eval_shape(lambda: block.init(jax.random.key(0), x, emb))
  )

  def output(bound):
    return quick.jit(block.clone(clip_act=bound).apply)(params, x, emb)

  free = output(None)
  assert np.abs(free).max() > 64
  np.testing.assert_allclose(output(64.0), np.clip(free, -64, 64), rtol=1e-5)
  assert edm2.EDM2().clip_act == edm2.Block(4).clip_act == 256


def test_logvar_is_made_by_init_and_needs_no_image(tiny):
  net, _, fresh, _ = tiny
  c = normal(2, 3)
  out = quick.jit(lambda p: net.apply({"params": p}, c, method="logvar"))(fresh)
  kernel = np.asarray(fresh["logvar_linear"]["kernel"], np.float64)
  f, p = (np.asarray(fresh["logvar_fourier"][k]) for k in ("freqs", "phases"))
  features = np.sqrt(2) * np.cos(c[:, None] * f + p)
  expected = features @ (kernel / np.sqrt((kernel**2).sum()))
  np.testing.assert_allclose(out, expected[:, 0], atol=1e-3)


def test_bfloat16_stays_inside_the_torso():
  net = edm2.EDM2(
    **TINY | dict(channel_mult=(1, 2), attention_resolutions=(4,)),
    dtype="bfloat16",
    float32_levels=0,
  )
  seen = {}

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if context.module.name == "out_conv":
      assert args[0].dtype == jnp.float32, "the head's input is rounded"
    if context.method_name == "__call__" and hasattr(out, "dtype"):
      seen["/".join(context.module.path)] = out.dtype
    return out

  with nn.intercept_methods(record):
    params = shapes(net, 8)
  assert {v.dtype for v in jax.tree.leaves(params)} == {np.dtype("float32")}
  wide = {k for k, v in seen.items() if v == jnp.float32}
  narrow = {k for k, v in seen.items() if v == jnp.bfloat16}
  top = {k for k in wide if "/" not in k}
  assert top == {
    "",
    "out_conv",
    "emb_fourier",
    "emb_noise",
    "emb_label",
    "logvar_fourier",
    "logvar_linear",
  }
  assert {k.split("/")[1] for k in wide - top} == {"emb_linear"}
  assert {k.split("/")[-1] for k in narrow} >= {
    "enc_8x8_conv",
    "conv_res0",
    "conv_res1",
    "conv_skip",
    "attn_qkv",
    "attn_proj",
  }


def test_bfloat16_is_near_float32(tiny):
  net, apply, _, gains = tiny
  x, c, y = inputs()
  exact = apply(gains, x, c, y, None)
  out = run(net.clone(dtype="bfloat16", float32_levels=0))(gains, x, c, y, None)
  assert out.dtype == jnp.float32
  assert 0 < np.abs(out - exact).max() / np.abs(exact).max() < 0.05


def test_recomputation_changes_nothing(tiny):
  net, apply, _, gains = tiny
  args = (gains, *inputs(), jax.random.split(jax.random.key(0), 4))
  again = run(net.clone(remat=True))
  assert "remat" in str(again.trace(*args).jaxpr)
  assert "remat" not in str(apply.trace(*args).jaxpr)
  out = apply(*args)
  np.testing.assert_allclose(
    again(*args), out, rtol=0, atol=1e-5 * np.abs(out).max()
  )


def test_levels_narrower_than_a_head_go_without_attention():
  found = leaves(shapes(edm2.EDM2(**TINY | dict(num_head_channels=32)), 4))
  assert not any("attn" in k for k in found)
  assert any("attn" in k for k in leaves(shapes(edm2.EDM2(**TINY), 4)))


def test_inputs_that_contradict_the_network():
  def init(changes, size=4, **inputs):
    return shapes(edm2.EDM2(**TINY | changes), size, **inputs)

  one = jnp.ones(1)
  for changes, args, match in (
    (dict(channel_mult=(1, 1, 1)), dict(size=6), "6x6 .*2 times.* of 4"),
    ({}, dict(c_noise_end=one), "c_noise_end: "),
    ({}, dict(labels=None), "num_classes=3.*-1"),
    (dict(num_classes=None), {}, "num_classes=None"),
    ({}, dict(labels=jnp.ones((1, 2))), r"\[B, 3\]"),
    (dict(num_head_channels=3), {}, "num_head_channels: got 3 .5 heads.*16 "),
  ):
    with pytest.raises(ValueError, match=match):
      init(changes, **args)
  init(dict(num_classes=None), labels=None)
