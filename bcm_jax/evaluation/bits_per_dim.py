"""Bits a dimension of test images, by the ODE of the network's denoiser."""

from typing import Any

import jax
import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.generate import batched_sampler
from bcm_jax.sampling import likelihood

Numbers = dict[str, Any]


def check(experiment: build.Experiment) -> None:
  """Raises UserError where section eval asks for what cannot be measured."""
  section = experiment.eval
  if not section.likelihood_images:
    return
  if not hasattr(experiment.method, "denoise"):
    raise errors.UserError(
        f"eval.likelihood_images={section.likelihood_images}: this network "
        "learnt to jump and holds no denoiser; set it to 0"
    )
  if not experiment.has_split("test"):
    raise errors.UserError(
        "eval.likelihood_images needs a test split; python -m "
        "bcm_jax.data.prepare with --holdout=N makes one"
    )


def measure(experiment: build.Experiment, params: Any) -> Numbers:
  """Mean and standard error over test images, some at a time."""
  check(experiment)
  section = experiment.eval
  method, size = experiment.method, experiment.sample.batch_size
  settings = likelihood.Likelihood(
      method.sigma_min, method.sigma_max, method.rho,
      legacy_ctm=section.ctm_likelihood_compat,
  )
  batch = batched_sampler.test_images(experiment, section.likelihood_images)
  labels = batch["label"] if experiment.num_classes is not None else None
  bits, calls = [], 0
  for first in range(0, len(batch["image"]), size):
    part = slice(first, first + size)
    found, made = likelihood.bits_per_dim(
        method.denoise, params, batch["image"][part],
        None if labels is None else labels[part],
        jax.random.fold_in(jax.random.key(section.seeds[0]), first), settings,
    )
    bits.append(found)
    calls = max(calls, made)
  bits = np.concatenate(bits)
  return {
      "images": len(bits),
      "bits_per_dim": float(np.mean(bits)),
      "standard_error": float(np.std(bits) / np.sqrt(len(bits))),
      "nfe": calls,
      "legacy": section.ctm_likelihood_compat,
  }


def summary(numbers: Numbers) -> str:
  """A line for a terminal."""
  return (
      f"likelihood: {numbers['bits_per_dim']:.3f} +- "
      f"{numbers['standard_error']:.3f} bits a dimension "
      f"({numbers['images']} test images, {numbers['nfe']} NFE)"
  )
