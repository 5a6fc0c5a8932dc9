"""Trajectory strips: images at all noise levels.

An image at level t is scaled by sigma_data / sqrt(sigma_data^2 + t^2), so that
noise and images are equally bright; the columns are uniform in log t.
"""

from collections.abc import Sequence
import math
import os

import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.generate import batched_sampler
from bcm_jax.plots import records
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import rng

_COLUMNS = 12
_ROWS = 6
# Number of samples if each takes two rows.
_PAIRS = 3
_AXIS = "noise level t (sigma, logarithmic)"


def trajectory(run: records.Run) -> list[records.Rows]:
  """Computes strips of a run's newest checkpoint, without guidance.

  From noise to images: for a network with an end level, one jump from sigma_max
  to every level; for a denoiser, the states of Heun's solver and the denoised
  images; for any other network, its samples with noise of every level added,
  and its output for them. For networks that support inversion, also real images
  inverted in one jump to every level.

  Raises:
    UserError: no checkpoint.
  """
  if not os.path.isdir(runs.checkpoint_dir(run.path)):
    raise errors.UserError(
        f"{run.path}: has no checkpoint, which a trajectory needs; train first"
    )
  config = resolve.of_existing_run(run.path)
  config.sample.guidance = 1.0
  experiment = build.build(config, to_train=False)
  step, average, params = runs.load_run(experiment, run.path)
  runner = batched_sampler.BatchedSampler(experiment, params, _ROWS)
  blocks = [_down(experiment, runner)]
  if experiment.method.supports_inversion:
    try:
      blocks.append(_up(experiment, runner))
    except errors.UserError as e:  # Only of the dataset.
      print(f"trajectory of {run.label} without real images: {e}")
  first = blocks[0]
  title = f"{first.title} [step {step}, {average}]"
  return [first._replace(title=title), *blocks[1:]]


def levels_between(start: float, end: float) -> list[float]:
  """Noise levels of the columns, uniform in log t, with exact ends."""
  inner = np.geomspace(start, end, _COLUMNS)[1:-1]
  return [start, *(float(t) for t in inner), end]


def shown(
    states: Sequence[np.ndarray], levels: Sequence[float], sigma_data: float
) -> np.ndarray:
  """Scales states [B, H, W, C] to uint8 [B, levels, H, W, C]."""
  scales = [sigma_data / math.hypot(sigma_data, t) for t in levels]
  return image_source.to_uint8(np.stack(
      [x * c for x, c in zip(states, scales, strict=True)], axis=1
  ))


def _jump(runner, x, labels, t: float, u: float) -> np.ndarray:
  """One jump of x [B, H, W, C] from level t to u."""
  return runner(
    sampling_plan.Plan("strip", t, (sampling_plan.Jump(t, u),)), x, labels, None
  )


def _down(experiment, runner) -> records.Rows:
  """Strip from noise to images."""
  method = experiment.method
  count = _ROWS if method.takes_end_time and not method.is_denoiser else _PAIRS
  keys = rng.example_keys(
    experiment.config.sample.seed, "sample/start", 0, jnp.arange(count)
  )
  noise = np.asarray(
    samplers.start_noise(keys, experiment.image_shape, method.sigma_max)
  )
  labels, names = None, [f"sample {i + 1}" for i in range(count)]
  if experiment.num_classes is not None:
    labels = (np.arange(count) * experiment.num_classes // count).astype(
      np.int32
    )
    names = [f"class {label}" for label in labels]
  levels = levels_between(method.sigma_max, method.sigma_min)
  strip = (
    _along_solver
    if method.is_denoiser
    else (_one_jump if method.takes_end_time else _noised_again)
  )
  title, parts = strip(method, runner, noise, labels, levels)
  images = np.stack(
    [shown(x, scales, method.sigma_data) for _, x, scales in parts], axis=1
  )
  return records.Rows(
    title,
    _AXIS,
    [f"{t:.2g}" for t in levels],
    [row.format(name) for name in names for row, _, _ in parts],
    images.reshape(-1, *images.shape[2:]),
  )


def _one_jump(method, runner, noise, labels, levels):
  start = levels[0]
  states = [noise] + [
    _jump(runner, noise, labels, start, t) for t in levels[1:]
  ]
  return "from noise, one jump f(x, T, t) to every level", [
    ("{}", states, levels)
  ]


def _along_solver(method, runner, noise, labels, levels):
  states = [noise]
  for t, u in zip(levels, levels[1:], strict=False):
    middle = math.sqrt(t * u)
    plan = sampling_plan.Plan(
      "strip",
      t,
      (sampling_plan.HeunJump(t, middle), sampling_plan.HeunJump(middle, u)),
    )
    states.append(runner(plan, states[-1], labels, None))
  # A denoiser's jump to level 0 is the denoiser itself.
  denoised = [
    _jump(runner, x, labels, t, 0.0)
    for x, t in zip(states, levels, strict=True)
  ]
  return "along Heun's solver: the state x at t, and the denoiser D(x, t)", [
    ("{}: x", states, levels),
    ("D(x, t)", denoised, [0.0] * len(levels)),
  ]


def _noised_again(method, runner, noise, labels, levels):
  start, end = levels[0], levels[-1]
  images = _jump(runner, noise, labels, start, end)
  states = [images + noise * (t / start) for t in levels]
  outputs = [
    _jump(runner, x, labels, t, end)
    for x, t in zip(states, levels, strict=True)
  ]
  title = "one-step samples with noise added: x at t, and f(x, t)"
  trained_levels = getattr(method, "start_levels", ())
  if trained_levels:
    text = ", ".join(f"{t:.2g}" for t in trained_levels)
    title += f"; trained at t = {text} only"
  return title, [
    ("{}: x", states, levels),
    ("f(x, t)", outputs, [0.0] * len(levels)),
  ]


def _up(experiment, runner) -> records.Rows:
  """Strip from real images to noise, and the reconstruction."""
  method, section = experiment.method, experiment.invert
  batch = batched_sampler.test_images(experiment, _ROWS)
  x, labels = image_source.to_float(batch["image"]), batch["label"]
  keys = rng.example_keys(section.seed, "invert/added", 0, jnp.arange(len(x)))
  levels = levels_between(section.noise, method.sigma_max)
  noisy = runner(
    sampling_plan.Plan(
      "strip",
      method.sigma_min,
      (sampling_plan.AddNoise(section.noise, section.noise),),
    ),
    x,
    labels,
    keys,
  )
  states = [noisy] + [
    _jump(runner, noisy, labels, section.noise, t) for t in levels[1:]
  ]
  restored = _jump(
    runner, states[-1], labels, method.sigma_max, method.sigma_min
  )
  images = shown([x, *states, restored], [0.0, *levels, 0.0], method.sigma_data)
  names = [f"class {label}" for label in labels]
  if experiment.num_classes is None:
    names = [f"image {i + 1}" for i in range(len(x))]
  return records.Rows(
    f"real images, noise e = {section.noise:g} added: one jump f(x, e, t) up "
    "to every level, and one jump down",
    _AXIS,
    ["real", *(f"{t:.2g}" for t in levels), "recon."],
    names,
    images,
  )
