"""Losses and their gradients against the official PyTorch code."""

import dataclasses
import functools
from unittest import mock
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.methods import bcm
from bcm_jax.methods import consistency
from tests import golden
from tests import toys
from tests.parity import files
from tests.parity import runner


def weights(case: golden.Golden):
  """Online and target parameters of a case, float64."""
  online = golden.load(case.meta["state_dict_from"].removesuffix(".npz"))
  recipe = case.meta["target_recipe"]
  if recipe is None:
    return golden.params(online), golden.params(online)
  moved = {}
  for key, value in online.arrays.items():
    if key.startswith("state_dict/"):
      name = key.removeprefix("state_dict/")
      seed = zlib.crc32((recipe["prefix"] + name).encode())
      noise = np.random.default_rng(seed).standard_normal(value.shape)
      value = np.float64(value) + recipe["scale"] * noise
      moved[key] = value.astype(np.float32)
  target = dataclasses.replace(online, arrays=moved)
  return golden.params(online), golden.params(target)


def cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def float32_limit(case, name):
  """Largest error of a float32 output; the gradients have no float64 twin."""
  entry = case.meta["f32_vs_f64"][name]
  return entry["suggested_rel_to_scale"] * entry["scale"]


def check_values(case, name, values, dtype):
  expected = case[f"out64/{name}"]
  limit = 1e-9 * np.abs(expected).max()
  if dtype == np.float32:
    limit = float32_limit(case, name)
  np.testing.assert_allclose(values, expected, rtol=0, atol=limit)


def check_gradients(case, prefix, grads):
  """Compares the recorded gradients, and only those."""
  names = [k for k in case.arrays if k.startswith(f"out/{prefix}/")]
  assert names
  for key in names:
    one = dataclasses.replace(case, arrays={key: case[key]})
    tree = golden.params(one, f"out/{prefix}/")
    (path, expected), = jax.tree_util.tree_leaves_with_path(tree)
    actual = functools.reduce(lambda t, k: t[k.key], path, grads)
    np.testing.assert_allclose(
        actual, expected, rtol=0, err_msg=key,
        atol=float32_limit(case, key.removeprefix("out/")),
    )


def with_noise(z):
  """Makes every loss traced inside use z [B, H, W, C] for its noise."""
  return mock.patch.object(process, "normal_like", lambda keys, x: z)


@functools.cache
def bcm_losses(gradients):
  """Compiled: per-example terms and, if asked, the gradient of their sum."""
  net = golden.network(golden.load("bcm_unet"))

  def run(params, target, images, labels, z, times, coefficients):
    t, r, u = times
    method = toys.at_times(bcm.BidirectionalTraining, t, r, u)(
        net, preconditioning.adm_c_noise, huber_c=0.06
    )
    ctx = toys.context(images, None, labels, {"target": target})

    def terms(params):
      with with_noise(z):
        total, metrics = method.loss(params, ctx)
      values = metrics["loss_ct"], metrics["loss_st"], total
      ct, soft = (jnp.mean(v) for v in values[:2])
      return coefficients[0] * ct + coefficients[1] * soft, values

    if not gradients:
      return terms(params)[1], None
    grad, values = jax.grad(terms, has_aux=True)(params)
    return values, grad

  return jax.jit(run)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "name", golden.with_more(["bcm_loss"], "bcm_loss_n321")
)
def test_bidirectional_loss_is_the_official_one(name, dtype):
  case = golden.load(name)
  grid = schedules.karras_sigmas(case.meta["num_scales"])
  i, j = case["in/indices"], case["in/t3_idx"]
  gradients = dtype == np.float64
  with jax.enable_x64(gradients):
    params, target = cast(weights(case), dtype)
    images, z, times = cast(
        (case.image("in/x_start"), case.image("in/noise"),
         (grid[i + 1], grid[i], grid[j])), dtype,
    )

    def run(*coefficients):
      return bcm_losses(gradients)(
          params, target, images, jnp.asarray(case["in/y"]), z, times,
          coefficients,
      )

    values, ct = run(1.0, 0.0)
    soft = run(0.0, 1.0)[1] if gradients else None
  assert values[0].dtype == dtype
  for key, value in zip(
      ("loss_ct", "loss_soft", "loss"), values, strict=True
  ):
    check_values(case, key, value, dtype)
  if gradients:
    check_gradients(case, "grad_loss_ct", ct)
    check_gradients(case, "grad_loss_soft", soft)


def cm_losses(params, target, images, labels, z, times):
  """Losses of openai's CT by name, and the gradient of the first's mean."""
  net = golden.network(golden.load("cm_unet"), qkv_norm=False)
  c_noise = preconditioning.adm_c_noise
  cls = toys.at_times(consistency.ConsistencyTraining, *times)
  methods = {
      f"loss_ct_{metric}_{weighting}": cls(
          net, c_noise, metric=metric, weighting=weighting
      )
      for metric, weighting in (
          ("l2", "uniform"), ("l2", "karras"), ("l1", "uniform")
      )
  }

  class Each(cls):
    """Takes each method's loss of the same two outputs."""

    def ct_term(self, a, b, times, ctx):
      return {k: m.ct_term(a, b, times, None) for k, m in methods.items()}

  def mean(params):
    ctx = toys.context(images, None, labels, {"target": target})
    with with_noise(z):
      losses, _ = Each(net, c_noise).loss(params, ctx)
    return jnp.mean(losses["loss_ct_l2_uniform"]), losses

  return jax.grad(mean, has_aux=True)(params)


@pytest.mark.slow
def test_consistency_losses_are_the_official_ones():
  case = golden.load("cm_loss")
  n = case.meta["num_scales"]
  grid = schedules.karras_sigmas(n)
  i = n - 1 - case["in/indices"]  # Their grid descends.
  with jax.enable_x64(True):
    params, target = cast(weights(case), np.float64)
    images, z, times = cast(
        (case.image("in/x_start"), case.image("in/noise"),
         (grid[i], grid[i - 1])), np.float64,
    )
    grad, losses = jax.jit(cm_losses)(
        params, target, images, jnp.asarray(case["in/y"]), z, times
    )
  for name, loss in losses.items():
    check_values(case, name, loss, np.float64)
  check_gradients(case, "grad_ct", grad)


@pytest.mark.slow
@pytest.mark.parametrize("name, outputs", [
    ("cm_loss", {
        "loss_cd_l2_uniform", "loss_cd_l2_karras", "loss_cd_l1_uniform",
        "edm_mse", "edm_xs_mse",
    }),
    ("ctm_songunet", {
        f"self_learn_{mode}_{term}"
        for mode in ("model_sg", "target_model_sg", "no", "iterative_model_sg")
        for term in ("consistency", "dsm")
    }),
])
def test_students_and_teachers_losses_are_the_official_ones(name, outputs):
  """By the runner of docs/checkpoints.md, in float64."""
  path = golden.path(name)
  file = files.load(path)
  assert outputs <= set(file.outputs)
  found = [
      line for line in runner.lines(path, "float64")
      if line.precision == "float64"
  ]
  assert found and all(line.passed for line in found), "\n".join(
      map(str, found)
  )
