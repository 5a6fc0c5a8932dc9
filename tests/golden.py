"""Reads the reference numbers in tests/goldens and builds their networks."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.models import adm

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# All reference files, where they lie beside the checkout; GOLDENS has a part.
MORE = pathlib.Path(__file__).parents[2] / "shared" / "goldens"


@dataclasses.dataclass(frozen=True)
class Golden:
  """One file: arrays by key, and what produced them."""

  arrays: dict[str, np.ndarray]
  meta: dict

  def __getitem__(self, key: str) -> np.ndarray:
    return self.arrays[key]

  def image(self, key: str) -> np.ndarray:
    """An image batch, NCHW in the file, as NHWC float64."""
    return np.moveaxis(self.arrays[key].astype(np.float64), 1, -1)

  def tolerance(self, name: str) -> float:
    """The largest |ours - out64| of an output computed in float32."""
    entry = self.meta["f32_vs_f64"][name]
    return entry["suggested_rel_to_scale"] * entry["scale"]


def path(name: str) -> pathlib.Path:
  """Where a file is."""
  here = GOLDENS / f"{name}.npz"
  return here if here.exists() else MORE / here.name


def with_more(names: list[str], *more: str) -> list[str]:
  """Names, and those of further files that are there."""
  return names + [m for m in more if path(m).exists()]


@functools.cache
def load(name: str) -> Golden:
  """Reads a file, from tests/goldens if it is there."""
  with np.load(path(name), allow_pickle=False) as file:
    arrays = {k: file[k] for k in file.files}
  return Golden(arrays, json.loads(str(arrays.pop("meta"))))


def _convert_leaf(module: str, kind: str, v: np.ndarray):
  """Our name and layout of one PyTorch tensor."""
  if kind == "bias":
    return "bias", v
  if module in ("qkv", "proj_out"):  # 1x1 convolutions there, Dense here.
    return "kernel", v.reshape(v.shape[:2]).T
  if v.ndim == 4:
    return "kernel", v.transpose(2, 3, 1, 0)
  if module == "label_emb":
    return "embedding", v
  return ("kernel", v.T) if v.ndim == 2 else ("scale", v)


def params(golden: Golden, prefix: str = "state_dict/") -> dict:
  """The weights of a file as a float64 parameter tree of our `ADM`.

  `input_blocks.4.0.in_layers.2.weight` becomes
  `input_blocks_4_0/in_layers_2/kernel`.
  """
  tree = {}
  for key in golden.arrays:
    if not key.startswith(prefix):
      continue
    *parts, kind = key.removeprefix(prefix).split(".")
    path = []
    for part in parts:
      if part.isdigit():
        path[-1] += f"_{part}"
      else:
        path.append(part)
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    leaf, value = _convert_leaf(path[-1], kind, golden[key])
    node[leaf] = value.astype(np.float64)
  return tree


def network(golden: Golden, **changes) -> adm.ADM:
  """The `ADM` that a file's constructor arguments describe."""
  c = golden.meta["constructor"]
  heads = c.get("num_head_channels", -1)
  settings = dict(
      model_channels=c["model_channels"],
      out_channels=c["out_channels"],
      channel_mult=tuple(c["channel_mult"]),
      num_res_blocks=c["num_res_blocks"],
      attention_resolutions=tuple(
          c["image_size"] // f for f in c["attention_resolutions"]
      ),
      num_head_channels=None if heads == -1 else heads,
      num_heads=c.get("num_heads", 1),
      num_classes=c["num_classes"],
      two_time="state_dict/time_embed_align.weight" in golden.arrays,
      resblock_updown=c["resblock_updown"],
      use_scale_shift_norm=c["use_scale_shift_norm"],
  )
  return adm.ADM(**(settings | changes))


@functools.cache
def raw_network(name: str, dtype: str, plain: bool = False):
  """A file's network with its weights, compiled once for all tests of a run.

  Args:
    name: the file.
    dtype: 'float32' or 'float64', of weights and inputs.
    plain: attention without QKV normalisation.

  Returns:
    F(x, c_noise, c_noise_end, labels) for the file's own batch size; works
    inside jax.disable_jit() too.
  """
  golden = load(name)
  net = network(golden, qkv_norm=not plain)
  with jax.enable_x64(dtype == "float64"):
    weights = jax.tree.map(lambda v: jnp.asarray(v, dtype), params(golden))
    batch = golden["in/x"].shape[0]
    level = jnp.ones(batch, dtype)
    inputs = (
        jnp.asarray(golden.image("in/x"), dtype),
        level,
        level if net.two_time else None,
        None if net.num_classes is None else jnp.zeros(batch, jnp.int32),
    )
    apply = jax.jit(net.apply).lower({"params": weights}, *inputs).compile()

  def call(x, c_noise, c_noise_end, labels):
    with jax.enable_x64(dtype == "float64"), jax.disable_jit(False):
      args = [jnp.asarray(v, dtype) for v in (x, c_noise)]
      args.append(
          jnp.asarray(c_noise_end, dtype) if net.two_time else None
      )
      args.append(
          None if net.num_classes is None else jnp.asarray(labels, jnp.int32)
      )
      return apply({"params": weights}, *args)

  return call


def close(actual, golden: Golden, name: str, rel: float | None = None) -> None:
  """Asserts that `actual` is the output `name` of a file; images are NHWC.

  Args:
    rel: largest error in units of the output's largest absolute value; None
      is the file's own tolerance for float32.
  """
  key = f"out64/{name}"
  expected = golden.image(key) if golden[key].ndim == 4 else golden[key]
  scale = np.abs(expected).max()
  limit = golden.tolerance(name) if rel is None else rel * scale
  np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)
