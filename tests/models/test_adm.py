"""The ADM U-Net's structure: published layouts, dropout, precision, errors.

The published networks are never allocated, only their shapes are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.models import adm
from bcm_jax.models import layers
from tests import toys

pytestmark = pytest.mark.slow

TINY = dict(
    model_channels=8, out_channels=1, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), num_head_channels=8, num_groups=2,
    num_classes=3, two_time=True, dropout_resolution=4,
)

SMALL = TINY | dict(channel_mult=(1,), num_classes=500)


def inputs(net, size=8, batch=4):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((batch, size, size, net.out_channels))
  t = jnp.linspace(-1000, 1000, batch)
  return (
      jnp.asarray(x, jnp.float32),
      t,
      -t if net.two_time else None,
      None if net.num_classes is None else jnp.arange(batch) % 3,
  )


def shapes(net, size=64):
  """Parameter shapes of a network, without making one."""
  args = inputs(net, size, batch=1)
  return jax.eval_shape(lambda: net.init(jax.random.key(0), *args))["params"]


@pytest.fixture(scope="module")
def small():
  """(one-level network with dropout, fresh parameters, non-zero ones).

  Not compiled as a whole: operation by operation is quicker to start.
  """
  net = adm.ADM(**SMALL, dropout=0.2, low_res_dropout=0.5)
  key = jax.random.key(0, impl="unsafe_rbg")  # Quick to compile.
  fresh = net.init(key, *inputs(net, 4))["params"]
  rng = np.random.default_rng(0)
  full = jax.tree.map(
      lambda v: v + 0.1 * rng.standard_normal(v.shape).astype(np.float32),
      fresh,
  )
  return net, fresh, full


def test_published_size_without_a_config():
  # tests/test_golden_texts.py counts the networks of configs.
  net = adm.ADM(num_classes=1000, attention_resolutions=(32, 16, 8))
  leaves = jax.tree.leaves(shapes(net))
  assert sum(v.size for v in leaves) == 282_168_003 and len(leaves) == 541
  assert {v.dtype for v in leaves} == {np.dtype("float32")}


def dropout_rates(net, size=64):
  """Rate of every residual block, by name."""
  rates = {}

  def record(call, args, kwargs, context):
    if isinstance(context.module, layers.Dropout):
      rates[context.module.path[-2]] = context.module.rate
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    shapes(net, size)
  return rates


def test_dropout_is_where_the_published_network_has_it():
  rates = dropout_rates(
      adm.ADM(num_classes=1000, two_time=True, low_res_dropout=0.2)
  )
  low = {
      *(f"input_blocks_{i}_0" for i in range(9, 16)),
      "middle_block_0", "middle_block_2",
      *(f"output_blocks_{i}_0" for i in range(8)),
      "output_blocks_3_2", "output_blocks_7_2",
  }
  high = {
      *(f"input_blocks_{i}_0" for i in range(1, 9)),
      *(f"output_blocks_{i}_0" for i in range(8, 16)),
      "output_blocks_11_1",
  }
  assert rates == {**dict.fromkeys(low, 0.2), **dict.fromkeys(high, 0.0)}


def test_one_rate_is_for_all_resolutions():
  rates = dropout_rates(adm.ADM(**TINY, dropout=0.1), size=8)
  assert len(rates) == 10 and set(rates.values()) == {0.1}


def test_fresh_network_is_silent(small):
  net, fresh, full = small
  args = inputs(net, 4)
  out = net.apply({"params": fresh}, *args)
  np.testing.assert_array_equal(out, np.zeros_like(args[0]))
  assert np.abs(net.apply({"params": full}, *args)).max() > 0.01

  # So an untrained flow map only scales its input.
  x, t, u = args[0], jnp.full(4, 3.0), jnp.full(4, 2.0)
  form = preconditioning.Bidirectional()
  f = preconditioning.precondition(
      lambda *a: net.apply({"params": fresh}, *a, args[3]), form, x, t, u
  )
  np.testing.assert_allclose(f, form(3.0, 2.0).c_skip * x, rtol=1e-6)


def test_fresh_parameters(small):
  _, fresh, _ = small
  zero = 0
  for path, v in jax.tree_util.tree_leaves_with_path(fresh):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if any(k in name for k in ("out_layers_3", "proj_out", "out_2")):
      assert not v.any(), name
      zero += 1
    elif name.endswith("scale"):
      assert (v == 1).all(), name
    elif not any(k in name for k in ("norm", "layers_0", "out_0")):
      assert float(v.std()) > 0, name
  # Two leaves each: 5 residual blocks, 4 attention blocks and the head.
  assert zero == 2 * (5 + 4 + 1)
  classes = fresh["label_emb"]["embedding"]
  assert float(classes.std()) == pytest.approx(1, abs=0.03)


def test_dropout_of_an_example_is_its_own(small):
  net, _, full = small
  args = inputs(net, 4)

  def apply(args, keys=None):
    return net.apply({"params": full}, *args, keys)

  keys = jax.random.split(jax.random.key(5), 4)
  together = apply(args, keys)
  np.testing.assert_array_equal(together, apply(args, keys))
  # The same examples in another company, in other places.
  order = np.array([2, 0, 3, 2])
  moved = apply([a[order] for a in args], keys[order])
  toys.assert_close(moved, together[order])
  for other in (apply(args, keys[::-1]), apply(args)):
    assert np.abs(together - other).max(axis=(1, 2, 3)).min() > 1e-3


def test_bfloat16_stays_inside_the_torso():
  net = adm.ADM(**TINY, dtype=jnp.bfloat16, float32_levels=0)
  seen = {}

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if context.module.name == "out_2":
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
      "", "out_0", "out_2", "label_emb", "time_embed_align",
      *(f"time_embed_{k}" for k in "02"),
      *(f"time_embed_end_{k}" for k in "02"),
  }
  # Inside blocks only the embedding's layer is wide; norms widen what they
  # sum and give back what they got (test_layers).
  assert {k.split("/")[1] for k in wide - top} == {"emb_layers_1"}
  assert "input_blocks_0_0" in narrow and "middle_block_1/qkv" in narrow
  assert {k.split("/")[-1] for k in narrow} >= {
      "in_layers_2", "out_layers_3", "skip_connection", "proj_out"
  }


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision_is_near_float32(small, dtype, limit):
  net, _, full = small
  args = inputs(net, 4)
  exact = net.apply({"params": full}, *args)
  out = net.clone(dtype=dtype, float32_levels=0).apply({"params": full}, *args)
  assert out.dtype == jnp.float32
  error = np.abs(out - exact).max() / np.abs(exact).max()
  assert 0 < error < limit


@pytest.mark.parametrize("size", [7, 10])
def test_image_that_cannot_be_halved(size):
  net = adm.ADM(**TINY | dict(channel_mult=(1, 1, 1)))
  with pytest.raises(ValueError, match=f"{size}x{size} .*2 times.* of 4"):
    shapes(net, size)


def test_inputs_that_contradict_the_network():
  x, t, u, y = inputs(adm.ADM(**TINY))

  def init(args, **changes):
    net = adm.ADM(**TINY | changes)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), *args))

  for args, changes, match in (
      ((x, t, None, y), {}, "two_time=True"),
      ((x, t, u, y), dict(two_time=False), "two_time=False"),
      ((x, t, u, None), {}, "num_classes=3"),
      ((x, t, u, y), dict(num_classes=None), "num_classes=None"),
  ):
    with pytest.raises(ValueError, match=match):
      init(args, **changes)
