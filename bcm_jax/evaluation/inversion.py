"""Reconstruction error after inversion of real test images.

The protocol of Li & He (BCM, 2024, arXiv:2403.18035): noise e z is added to
test images, which are inverted in n evaluations and reconstructed in one; the
error is between 8-bit images on the [0, 1] scale. Baselines are DDIM and Heun
inversions by a denoiser (Karras et al., 2022), reconstructed by the same
solver.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.editing import similarity
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.sampling import samplers
from bcm_jax.training import rng

# Solver -> evaluations per step.
_BASELINES = {"euler": 1, "heun": 2}
_NAMES = {"euler": "DDIM", "heun": "EDM Heun"}

Numbers = dict[str, Any]


def curve(
    experiment: build.Experiment, runner: batched_sampler.BatchedSampler
) -> dict[str, Numbers]:
  """Computes reconstruction errors over evaluations and initial noise.

  Args:
    experiment: the experiment; its test split is inverted.
    runner: batched sampler of the network.

  Returns:
    'nfe2' -> metrics at invert.noise; 'nfe2_noise0.1' -> metrics at another
    noise of eval.inversion_noise; 'DDIM_nfe4_noise0.002' and
    'EDM Heun_nfe4_...' -> metrics of the baseline's denoiser.
  """
  section = experiment.eval
  default_noise = experiment.invert.noise
  result = {}
  if not (experiment.method.supports_inversion or section.inversion_baseline):
    return result
  if experiment.source_if_available("test") is None:
    print("inversion: skipped, no test images; create a test split with "
          "python -m bcm_jax.data.prepare --holdout=N")
    return result
  batch = batched_sampler.test_images(
      experiment, experiment.invert.num_images
  )
  measure = similarity.perceptual(section.lpips_path)
  if experiment.method.supports_inversion:
    points = [(n, default_noise) for n in section.inversion_nfe] + [
        (n, e) for e in section.inversion_noise for n in section.inversion_nfe
        if e != default_noise
    ]
    for nfe, noise in points:
      suffix = "" if noise == default_noise else f"_noise{noise:g}"
      result[f"nfe{nfe}{suffix}"] = _network_inversion(
          experiment, runner, nfe, noise, batch, measure
      )
  if section.inversion_baseline:
    result |= _baselines(experiment, batch, measure)
  return result


def _network_inversion(
    experiment, runner, nfe, noise, batch, measure
) -> Numbers:
  """Inversion by the network in nfe evaluations, reconstruction in one."""
  plan = planning.inversion_plan(experiment, nfe, noise)
  latents, images = batched_sampler.invert_and_reconstruct(
      experiment, runner, plan, batch, experiment.invert.seed
  )
  return {"nfe": nfe, "noise": noise, "plan": str(plan).splitlines()} | _errors(
      batch["image"], images, latents, measure
  )


def _errors(originals, images, latents, measure) -> Numbers:
  return similarity.errors(originals, images, measure) | {
      "latent_std": float(np.std(latents))
  }


# Baselines -----------------------------------------------------------------


def denoiser_of(flow_map: Callable, labels) -> solvers.Denoiser:
  """Returns D(x, sigma) = f(x, sigma, 0) of a flow map.

  With the preconditioning of EDM and BCM f(x, t, 0) is the denoiser itself, and
  f(x, t, u) is DDIM's step with it.
  """

  def denoise(x, sigma):
    t = jnp.full(x.shape[:1], sigma, x.dtype)
    return flow_map(x, t, jnp.zeros_like(t), labels)

  return denoise


def ode_round_trip(
    flow_map: Callable, x, labels, up: np.ndarray, down: np.ndarray,
    solver: str,
):
  """Inverts x and reconstructs it, both with a solver of the ODE.

  Args:
    flow_map: f(x, t, u, labels).
    x: [B, H, W, C] at level up[0].
    labels: classes [B] or None.
    up: ascending noise levels of the inversion.
    down: descending noise levels of the reconstruction.
    solver: 'euler' (DDIM) or 'heun'.

  Returns:
    (latents, reconstructions), [B, H, W, C] each.
  """
  denoise = denoiser_of(flow_map, labels)
  latents = solvers.solve(denoise, x, up, solver)
  return latents, solvers.solve(denoise, latents, down, solver)


def _baselines(experiment, batch, measure) -> dict[str, Numbers]:
  section = experiment.eval
  teacher, params = _open_baseline(experiment, section.inversion_baseline)
  runner = batched_sampler.BatchedSampler(
      teacher, params, experiment.sample.batch_size
  )
  low, high = experiment.levels.sigma_min, experiment.levels.sigma_max
  rho = experiment.method.rho
  result = {}
  for noise in (low, *section.inversion_noise):
    x = _noisy(experiment, batch["image"], noise if noise > low else 0.0)
    for solver, evaluations in _BASELINES.items():
      for nfe in section.inversion_baseline_nfe:
        n = nfe // evaluations
        if not n or nfe % evaluations:
          continue
        up = schedules.karras_sigmas(n + 1, noise, high, rho)
        down = schedules.karras_sigmas(n + 1, low, high, rho)[::-1]
        latents, images = runner.transform(
            lambda f, x, labels, up=up, down=down, solver=solver:
            ode_round_trip(f, x, labels, up, down, solver),
            x, batch["label"],
        )
        result[f"{_NAMES[solver]}_nfe{nfe}_noise{noise:g}"] = {
            "nfe": nfe, "noise": noise, "solver": _NAMES[solver],
            **_errors(
                batch["image"], image_source.to_uint8(images), latents, measure
            ),
        }
  return result


def _noisy(experiment, images: np.ndarray, noise: float) -> np.ndarray:
  """Test images in [-1, 1] plus noise of standard deviation `noise`."""
  x = image_source.to_float(images)
  keys = rng.example_keys(
      experiment.invert.seed, "invert/baseline", 0,
      jnp.arange(len(x)),
  )
  return x + np.asarray(samplers.start_noise(keys, x.shape[1:], noise))


def _open_baseline(experiment, place: str):
  """Builds the baseline's experiment and loads its parameters."""
  workdir, step = runs.split_place(place, "eval.inversion_baseline")
  config = resolve.of_existing_run(workdir)
  teacher = build.build(config, to_train=False)
  # A one-time network is a denoiser if its preconditioning at u = 0 is EDM's.
  shared = not teacher.method.takes_end_time and (
      teacher.method.coefficients.ends_at_denoiser
  )
  if not (teacher.method.is_denoiser or shared):
    raise errors.UserError(
        f"eval.inversion_baseline: got {workdir} ({config.method.name!r} with "
        f"preconditioning {config.method.preconditioning!r}), expected a "
        "denoiser; use a run converted from EDM's weights or trained as one"
    )
  if teacher.image_shape != experiment.image_shape:
    raise errors.UserError(
        f"eval.inversion_baseline: got {workdir} of image shape "
        f"{teacher.image_shape}, expected {experiment.image_shape}; use a "
        "denoiser of the same dataset"
    )
  _, _, params = runs.load_run(teacher, workdir, step=step)
  return teacher, params


def summary(inversion: dict[str, Numbers]) -> list[str]:
  """Formats the errors as lines of text."""
  lines = []
  for name, r in inversion.items():
    way = "by the same solver" if "solver" in r else "in 1 NFE"
    lines.append(
        f"inversion {name}, reconstruction {way}: MSE {r['mse']:.5f} on [0, 1] "
        f"({r['images']} test images)"
    )
  return lines


def check(experiment: build.Experiment) -> None:
  """Raises UserError for invalid times and baselines."""
  section = experiment.eval
  if experiment.method.supports_inversion:
    for nfe in section.inversion_nfe:
      for noise in (None, *section.inversion_noise):
        planning.inversion_plan(experiment, nfe, noise)
  if section.inversion_baseline:
    _open_baseline(experiment, section.inversion_baseline)
