"""The EDM2 network against the official one, in float64 and float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.models import edm2
from tests import golden
from tests import quick

FILE = "edm2_precond"
OUTPUTS = {
    "F", "D", "logvar", "D_nolabel", "loss_map", "loss_map_trainmode"
}


def network() -> edm2.EDM2:
  c = golden.load(FILE).meta["constructor"]
  return edm2.EDM2(
      model_channels=c["model_channels"],
      out_channels=c["img_channels"],
      channel_mult=tuple(c["channel_mult"]),
      num_res_blocks=c["num_blocks"],
      attention_resolutions=tuple(c["attn_resolutions"]),
      num_head_channels=c["channels_per_head"],
      num_classes=c["label_dim"],
      logvar_channels=c["logvar_channels"],
  )


def thirds(qkv: np.ndarray) -> np.ndarray:
  """Output channels (head, channel, qkv) as (qkv, head, channel)."""
  c = golden.load(FILE).meta["constructor"]["channels_per_head"]
  kernel = qkv.reshape(*qkv.shape[:-1], -1, c, 3)
  return np.moveaxis(kernel, -1, -3).reshape(qkv.shape)


def rename(key: str, v: np.ndarray) -> tuple[list[str], np.ndarray]:
  """Our path and layout of one PyTorch tensor."""
  *path, leaf = key.removeprefix("unet.").split(".")
  if path and path[0] in ("enc", "dec"):
    path = ["_".join(path[:2]), *path[2:]]
  if leaf == "weight":
    leaf = "kernel"
    v = np.moveaxis(v, (0, 1), (-1, -2))
    v = thirds(v) if path[-1] == "attn_qkv" else v
  return [*path, leaf], v.astype(np.float64)


def nested(arrays: dict, prefix: str) -> dict:
  """A file's tensors as a float64 tree by our names."""
  tree = {}
  for key in arrays:
    if key.startswith(prefix):
      path, value = rename(key.removeprefix(prefix), arrays[key])
      node = tree
      for part in path[:-1]:
        node = node.setdefault(part, {})
      node[path[-1]] = value
  return tree


def weights_in(dtype: str) -> dict:
  tree = nested(golden.load(FILE).arrays, "state_dict/")
  return jax.tree.map(lambda v: v.astype(dtype), tree)


def forward(w, x, c_noise, labels):
  return network().apply({"params": w}, x, c_noise, labels=labels)


def logvar(w, c_noise):
  return network().apply({"params": w}, c_noise, method="logvar")


def denoise(f, w, x, sigma, labels, xp=np):
  """EDM's D, written out for sigma_data = 0.5; xp is np or, traced, jnp."""
  c_noise, sigma = xp.log(sigma) / 4, sigma[:, None, None, None]
  total = sigma**2 + 0.25
  out = f(w, x / xp.sqrt(total), c_noise, labels)
  return x * 0.25 / total + out * sigma / 2 / xp.sqrt(total)


def loss_map(f, logvar, w, dtype, xp=np):
  """Karras et al. (2024), eq. 21, a pixel at a time."""
  g = golden.load(FILE)
  clean, noise = (
      g.image(f"in/{k}").astype(dtype) for k in ("x_start", "noise")
  )
  sigma = np.exp(g["in/rnd_normal"][:, 0, 0, 0].astype(dtype) - 0.4)
  level = sigma[:, None, None, None]
  labels = g["in/labels"].astype(dtype)
  d = denoise(f, w, clean + noise * level, sigma, labels, xp)
  weight = (level**2 + 0.25) / (level / 2) ** 2
  u = logvar(w, np.log(sigma) / 4)[:, None, None, None]
  return weight / xp.exp(u) * (d - clean) ** 2 + u


@functools.cache
def outputs(dtype: str) -> dict:
  """Everything of the file that needs no gradient."""
  g = golden.load(FILE)
  quick_f, quick_u = quick.jit(forward), quick.jit(logvar)

  def f(*args):
    return np.asarray(quick_f(*args))

  def u(*args):
    return np.asarray(quick_u(*args))

  with jax.enable_x64(dtype == "float64"):
    w = weights_in(dtype)
    x, xs = (g.image(f"in/{k}").astype(dtype) for k in ("x", "xs"))
    c_noise, sigma, labels = (
        g[f"in/{k}"].astype(dtype) for k in ("c_noise", "sigma", "labels")
    )
    projected = quick.jit(edm2.normalize_weights)(w)
    out = {
        "F": f(w, x, c_noise, labels),
        "D": denoise(f, w, xs, sigma, labels),
        "D_nolabel": denoise(f, w, xs, sigma, 0 * labels),
        "logvar": u(w, np.log(sigma) / 4)[:, None, None, None],
        "loss_map": loss_map(f, u, w, dtype),
        "loss_map_trainmode": loss_map(f, u, projected, dtype),
    }
  assert {v.dtype for v in out.values()} == {np.dtype(dtype)}
  return out | {"weights": jax.tree.map(np.asarray, projected)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_network_in_float64(name):
  golden.close(outputs("float64")[name], golden.load(FILE), name, rel=1e-9)


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_network_in_float32(name):
  golden.close(outputs("float32")[name], golden.load(FILE), name)


@functools.cache
def gradient() -> dict:
  """d(sum of the loss map / batch), in float32 as in the file."""

  def loss(w):
    return loss_map(forward, logvar, w, "float32", jnp).sum() / 3

  found = quick.jit(jax.grad(loss))(weights_in("float32"))
  return jax.tree.map(np.asarray, found)


def at(tree: dict, path: list[str]) -> np.ndarray:
  return functools.reduce(lambda node, part: node[part], path, tree)


def compare(group: str, ours: dict, count: int) -> None:
  """Asserts that a tree has the tensors of out/<group> in a file."""
  g = golden.load(FILE)
  keys = [k for k in g.arrays if k.startswith(f"out/{group}/")]
  assert len(keys) == count
  for key in keys:
    path, expected = rename(key.removeprefix(f"out/{group}/"), g[key])
    np.testing.assert_allclose(
        at(ours, path), expected, rtol=0, err_msg=key,
        atol=g.tolerance(key.removeprefix("out/")),
    )


@pytest.mark.slow
def test_gradients():
  compare("grad_loss", gradient(), 17)


@pytest.mark.slow
def test_renormalised_weights():
  compare("renormalised", outputs("float64")["weights"], 2)


@pytest.mark.slow
def test_gradients_are_orthogonal_to_kernels_and_none_reaches_constants():
  weights, kernels = weights_in("float32"), 0
  for path, g in jax.tree_util.tree_leaves_with_path(gradient()):
    path = [part.key for part in path]
    if path[-1] == "kernel":
      kernels += 1
      g, w = (v.reshape(-1, v.shape[-1]) for v in (g, at(weights, path)))
      size = np.linalg.norm(g, axis=0) * np.linalg.norm(w, axis=0)
      # The 1e-4 in the norm leaves that much of the radial part.
      assert (np.abs((g * w).sum(0)) <= 2e-3 * size).all(), path
    elif path[-1] in ("freqs", "phases"):
      assert not g.any(), path
    else:
      assert path[-1] in ("emb_gain", "out_gain") and g != 0, path
  assert kernels == sum(
      k.startswith("state_dict/") and k.endswith(".weight")
      for k in golden.load(FILE).arrays
  )


def test_parameters_are_the_published_ones_renamed():
  fresh = jax.eval_shape(
      lambda: network().init(
          jax.random.key(0), jnp.ones((1, 16, 16, 4)), jnp.ones(1),
          labels=jnp.zeros(1, jnp.int32),
      )
  )["params"]
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(
      jnp.shape, nested(golden.load(FILE).arrays, "state_dict/")
  )
