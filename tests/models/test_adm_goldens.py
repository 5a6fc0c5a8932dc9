"""The ADM U-Net against the official networks, in float64 and float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning as pre
from bcm_jax.models import end_time
from tests import golden

BCM = golden.with_more(["bcm_unet"], "bcm_unet_ssn", "bcm_unet_depth")
ONE_TIME = golden.with_more(["cm_unet"], "ict_unet")
PLAIN = {"cm_unet"}  # Its published form has no QKV normalisation.


def first(names):
  """Returns parameters for pytest: all names but the first are slow."""
  return [
      names[0], *(pytest.param(n, marks=pytest.mark.slow) for n in names[1:])
  ]


def raw(name, key, dtype, swapped=False, plain=None):
  """F of a file's network at the file's input."""
  g = golden.load(name)
  plain = name in PLAIN if plain is None else plain
  net = golden.raw_network(name, dtype, plain)
  t, u = g["in/t"], g.arrays.get("in/t_end")
  if swapped:
    t, u = u, t
  return net(g.image(key), t, u, g.arrays.get("in/y"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BCM + ONE_TIME)
def test_network_in_float64(name):
  golden.close(raw(name, "in/x", "float64"), golden.load(name), "F", rel=1e-10)


@pytest.mark.parametrize("name", first(["bcm_unet", "cm_unet"]))
def test_network_in_float32(name):
  out = raw(name, "in/x", "float32")
  assert out.dtype == jnp.float32
  golden.close(out, golden.load(name), "F")


@pytest.mark.parametrize("name", first(
    golden.with_more(["bcm_unet"], "bcm_unet_ssn")
))
def test_plain_attention(name):
  out = raw(name, "in/x", "float64", plain=True)
  golden.close(out, golden.load(name), "F_nocosine", rel=1e-10)


@pytest.mark.parametrize("name", first(BCM))
def test_the_two_times_are_told_apart(name):
  out = raw(name, "in/x", "float64", swapped=True)
  golden.close(out, golden.load(name), "F_t_swapped", rel=1e-10)


def preconditioned(name, form, end, plain=False):
  g = golden.load(name)
  net = golden.raw_network(name, "float64", plain)
  with jax.enable_x64(True):
    t = jnp.asarray(g["in/sigma"], jnp.float64)
    u = jnp.full(t.shape, 0.002) if end is None else jnp.asarray(
        g[end], jnp.float64
    )
    return pre.precondition(
        lambda x, a, b: net(x, a, b, g.arrays.get("in/y")),
        form, jnp.asarray(g.image("in/xs")), t, u,
    )


@pytest.mark.parametrize("name", first(BCM))
@pytest.mark.parametrize("output, end", [
    ("denoise_D", "in/sigma_end"), ("denoise_noend_D", None),
])
def test_flow_maps(name, output, end):
  out = preconditioned(name, pre.Bidirectional(), end)
  golden.close(out, golden.load(name), output, rel=1e-10)


@pytest.mark.parametrize("name", first(ONE_TIME))
@pytest.mark.parametrize("output, form", [
    ("denoise_D_boundary", pre.ConsistencyBoundary()),
    ("denoise_D_edm", pre.EDM()),
])
def test_consistency_functions(name, output, form):
  out = preconditioned(name, form, None, name in PLAIN)
  golden.close(out, golden.load(name), output, rel=1e-10)


@pytest.mark.parametrize("name", BCM + ONE_TIME + ["bcm_finetune_init"])
def test_parameters_are_the_published_ones_renamed(name):
  g = golden.load(name)
  net = golden.network(g)
  level = jnp.ones(2)
  fresh = jax.eval_shape(
      lambda: net.init(
          jax.random.key(0), jnp.ones((2, 16, 16, 3)), level,
          level if net.two_time else None,
          None if net.num_classes is None else jnp.zeros(2, jnp.int32),
      )
  )["params"]
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(
      jnp.shape, golden.params(g)
  )


@pytest.fixture(scope="module")
def extended():
  """(one-time network, its weights, two-time network, its weights), f64."""
  g = golden.load("bcm_finetune_init")
  one = golden.network(g)
  two = one.clone(two_time=True)
  with jax.enable_x64(True):
    weights = jax.tree.map(jnp.asarray, golden.params(g))
    fresh = jax.eval_shape(
        lambda: two.init(
            jax.random.key(0), jnp.ones((1, 16, 16, 3)), jnp.ones(1),
            jnp.ones(1), jnp.zeros(1, jnp.int32),
        )
    )["params"]
    return one, weights, two, end_time.add_second_time(two, weights, fresh)


def test_second_time_branch_is_the_published_one(extended):
  g = golden.load("bcm_finetune_init")
  _, old, _, new = extended
  added = golden.params(g, "bcm_added/")
  assert set(new) - set(old) == set(added)
  for part, expected in added.items():
    assert jax.tree.map(jnp.shape, new[part]) == jax.tree.map(
        jnp.shape, expected
    )
    jax.tree.map(np.testing.assert_array_equal, dict(new[part]), expected)
  for part in old:
    assert new[part] is old[part]


@pytest.mark.slow
def test_second_time_branch_leaves_the_network_as_it_was(extended):
  g = golden.load("bcm_finetune_init")
  one, old, two, new = extended
  apply = jax.jit(two.apply)
  with jax.enable_x64(True):
    y = jnp.asarray(g["in/y"])

    def f(x, t, u):
      return apply({"params": new}, x, t, u, y)

    x, t = jnp.asarray(g.image("in/x")), jnp.asarray(g["in/t"], jnp.float64)
    u = jnp.asarray(g["in/t_end"], jnp.float64)
    out = f(x, t, u)
    golden.close(out, g, "bcm_F", rel=1e-10)
    golden.close(out, g, "cm_F", rel=1e-10)
    before = jax.jit(one.apply)({"params": old}, x, t, None, y)
    np.testing.assert_allclose(out, before, rtol=0, atol=1e-13)
    for other in (-u, 0 * u - 1553.0):
      np.testing.assert_array_equal(f(x, t, other), out)

    xs = jnp.asarray(g.image("in/xs"))
    s, e = (jnp.asarray(g[k], jnp.float64) for k in ("in/sigma",
                                                     "in/sigma_end"))
    low = jnp.full(s.shape, 0.002)
    bcm, cm = pre.Bidirectional(), pre.ConsistencyBoundary()
    after = pre.precondition(f, bcm, xs, s, low)
    golden.close(after, g, "bcm_denoise_D", rel=1e-10)
    to_end = pre.precondition(f, bcm, xs, s, e)
    golden.close(to_end, g, "bcm_denoise_toend_D", rel=1e-10)
    ours = pre.precondition(f, cm, xs, s, low)
    golden.close(ours, g, "cm_denoise_D_boundary", rel=1e-10)
    spread = np.sqrt(np.asarray(s) ** 2 + 0.25)[:, None, None, None]
    # The forms differ by 0.002 of a noisy image's own size.
    gap = np.abs(after - ours) / (np.abs(xs) / spread)
    assert gap.max() <= 0.002 * (1 + 1e-9)
