"""SongUNet and the other networks that EDM, CTM and jcm published."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.interop import transfer
from bcm_jax.models import adm
from bcm_jax.models import end_time
from bcm_jax.models import song
from tests import golden
from tests import quick
from tests import toys

FILES = golden.with_more(
    ["edm_ncsnpp", "ctm_songunet", "jcm_ncsnpp", "edm_adm"],
    "edm_ddpmpp", "edm_adm_heads", "ctm_unet",
)
# jcm divides by a float32 root of 2, and its `cond` is rounded to float32.
LIMIT = {"jcm_ncsnpp": 1e-6}
TINY = dict(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,),
)


@functools.cache
def published(name):
  """(network, image size, our weights in their own dtype) of a file."""
  g = golden.load(name)
  c = g.meta["constructor"]
  tensors = {
      k.removeprefix("state_dict/"): v
      for k, v in g.arrays.items() if k.startswith("state_dict/")
  }
  size = c.get("image_size") or c.get("img_resolution") or g.meta["image_size"]
  family, tensors, found = transfer.recognize(tensors, metadata={
      "image_size": size,
      "attention_resolutions": tuple(c.get("attn_resolutions", ())),
  })
  found.pop("image_size")
  if family.NAME == "openai":  # Its names do not tell sizes and heads.
    found["attention_resolutions"] = tuple(
        size // f for f in c["attention_resolutions"]
    )
    found["num_head_channels"] = c["num_head_channels"]
  network = family.NETWORK(**found)
  return network, transfer.read_params(family, network, size, tensors)


def inputs(name, dtype):
  """Arguments of F, as the file's notes describe the call."""
  g, (network, _) = golden.load(name), published(name)

  def vector(key):
    return np.asarray(g[f"in/{key}"], np.float64)

  image = (lambda k: g[k]) if "jcm" in name else g.image
  if "in/xs" in g.arrays and network.two_time:
    t, s = vector("t"), vector("s")
    noise = (
        preconditioning.adm_c_noise if isinstance(network, adm.ADM)
        else preconditioning.edm_c_noise
    )
    x = image("in/xs") / np.sqrt(t**2 + 0.25)[:, None, None, None]
    levels = [noise(jnp.asarray(v, dtype)) for v in (t, s)]
  else:
    x = image("in/x")
    levels = [vector("cond" if "jcm" in name else "c_noise"), None]
  labels = None
  if network.num_classes is not None:
    labels = g.arrays.get("in/y")
    labels = g["in/labels"].argmax(-1) if labels is None else labels
  augment = vector("augment_labels") if network.augment_dim else None
  return [
      None if v is None else jnp.asarray(v, dtype)
      for v in (x, *levels)
  ] + [labels, None, None if augment is None else jnp.asarray(augment, dtype)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_network_is_the_official_one(name):
  g, (network, params) = golden.load(name), published(name)
  expected = g["out64/F"] if "jcm" in name else g.image("out64/F")
  scale = np.abs(expected).max()
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), params)
    out = quick.jit(network.apply)({"params": wide}, *inputs(name, jnp.float64))
    np.testing.assert_allclose(
        out, expected, rtol=0, atol=LIMIT.get(name, 1e-10) * scale
    )
  out = quick.jit(network.apply)({"params": params}, *inputs(name, jnp.float32))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(
      out, expected, rtol=0, atol=g.tolerance("F")
  )


# Trainable parameters as published (diffusion_family.md 1.7), where no config
# has the network; tests/test_golden_texts.py counts those of configs.
# `freqs`, a buffer there, is counted by jcm alone.
@pytest.mark.slow
@pytest.mark.parametrize("cls, settings, size, count", [
    (song.SongUNet, dict(augment_dim=9), 32, 55_733_891),
    (song.SongUNet, {}, 32, 55_732_739),
    (song.SongUNet, song.NCSNPP | dict(augment_dim=9), 32, 56_397_827 + 128),
    (song.SongUNet, dict(augment_dim=9, channel_mult=(1, 2, 2, 2)), 64,
     61_805_571),
])
def test_published_parameter_counts(cls, settings, size, count):
  shapes = transfer.shapes(cls(**settings), size)
  assert sum(map(math.prod, shapes.values())) == count


def arguments(network, batch=4, size=8):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((batch, size, size, 3)), jnp.float32)
  t = jnp.linspace(-1.5, 1.1, batch)
  return [
      x, t, -t if network.two_time else None,
      None if network.num_classes is None else jnp.arange(batch) % 3,
  ]


def filled(network, size=8):
  """Random parameters without a zero among them."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(
      network.init, jax.random.key(0), *arguments(network, size=size)
  )["params"]
  return jax.tree.map(
      lambda s: (rng.standard_normal(s.shape) / math.sqrt(
          max(1, math.prod(s.shape[:-1])))).astype(np.float32), shapes
  )


@functools.cache
def small(**settings):
  network = song.SongUNet(**TINY | settings)
  return network, filled(network)


@pytest.mark.slow
def test_output_is_nearly_zero_at_the_start():
  network, _ = small()
  args = arguments(network)
  params = quick.jit(network.init)(jax.random.key(0), *args)
  out = quick.jit(network.apply)(params, *args)
  assert 0 < float(jnp.abs(out).max()) < 1e-3


@pytest.mark.slow
def test_dropout_of_an_example_is_its_own():
  network, params = small(dropout=0.3)
  args = arguments(network)
  keys = jax.random.split(jax.random.key(5), 4)
  apply = quick.jit(lambda args, keys: network.apply(
      {"params": params}, *args, keys))
  together = apply(args, keys)
  order = np.array([2, 0, 3, 2])
  moved = apply(
      [None if a is None else a[order] for a in args], keys[order]
  )
  toys.assert_close(moved, together[order])
  changed = np.abs(together - apply(args, keys[::-1])).max(axis=(1, 2, 3))
  assert changed.min() > 1e-3


@pytest.mark.slow
def test_no_class_and_no_augmentation_are_zero():
  network, params = small(num_classes=3, augment_dim=9)
  x, t, end, labels = arguments(network)
  apply = quick.jit(lambda params, labels, augment: network.apply(
      {"params": params}, x, t, end, labels, None, augment))
  none = apply(params, labels, None)
  assert np.abs(none - apply(params, labels, jnp.ones((4, 9)))).max() > 1e-2
  unlabelled = apply(params, jnp.full(4, -1), None)
  rowless = dict(params, map_label=dict(
      params["map_label"], kernel=0 * params["map_label"]["kernel"]
  ))
  toys.assert_close(unlabelled, apply(rowless, labels, None))


@pytest.mark.slow
def test_bidirectional_form_starts_as_the_one_time_network():
  one, old = small()
  two = one.clone(two_time=True)
  x, t, _, _ = arguments(one)
  fresh = filled(two)
  params = end_time.add_second_time(two, old, fresh)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  apply = quick.jit(two.apply)
  before = quick.jit(one.apply)({"params": old}, x, t)
  for end in (t, -t):
    toys.assert_close(apply({"params": params}, x, t, end), before)
  assert np.abs(
      apply({"params": fresh}, x, t, t) - apply({"params": fresh}, x, t, -t)
  ).max() > 1e-3


@pytest.mark.slow
def test_remat_and_bfloat16_change_little():
  network, params = small()
  args = arguments(network)
  exact = quick.jit(network.apply)({"params": params}, *args)
  again = quick.jit(network.clone(remat=True).apply)({"params": params}, *args)
  toys.assert_close(again, exact)
  half = quick.jit(network.clone(dtype="bfloat16").apply)(
      {"params": params}, *args
  )
  assert half.dtype == jnp.float32
  error = np.abs(half - exact).max() / np.abs(exact).max()
  assert 0 < error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("settings, part", [
    (dict(encoder="skip"), "aux_skip"),
    (dict(encoder="residual", resample_filter=(1, 3, 3, 1)), "aux_residual"),
    (dict(decoder="skip"), "dec_4x4_aux_conv"),
])
def test_pyramids_reach_the_output(settings, part):
  network, params = small(**settings)
  (layer,) = [k for k in params if k.endswith(part)]
  args = arguments(network)
  apply = quick.jit(lambda params: network.apply({"params": params}, *args))
  without = dict(params, **{layer: jax.tree.map(jnp.zeros_like, params[layer])})
  assert np.abs(apply(params) - apply(without)).max() > 1e-2
