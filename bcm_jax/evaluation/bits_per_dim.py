"""Negative log-likelihood of test images in bits/dim.

Uses the probability flow ODE of the denoiser (Song et al., 2021,
arXiv:2011.13456, section 4.3).
"""

from typing import Any

import jax
import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.generate import batched_sampler
from bcm_jax.sampling import likelihood

Numbers = dict[str, Any]


def check(experiment: build.Experiment) -> None:
  """Raises UserError if the likelihood of section eval is not defined."""
  section = experiment.eval
  if not section.likelihood_images:
    return
  if not hasattr(experiment.method, "denoise"):
    raise errors.UserError(
        f"eval.likelihood_images: got {section.likelihood_images}, expected 0 "
        f"for {experiment.config.method.name!r}, which does not train a "
        "denoiser; set it to 0"
    )
  if not experiment.has_split("test"):
    raise errors.UserError(
        "eval.likelihood_images: needs a test split; create one with python "
        "-m bcm_jax.data.prepare --holdout=N"
    )


def measure(experiment: build.Experiment, params: Any) -> Numbers:
  """Computes mean and standard error of bits/dim over test images, in batches.

  Returns:
    images: number of images. bits_per_dim, standard_error: in bits/dim. nfe:
    largest number of network evaluations of a batch. legacy: whether CTM's
    released code is reproduced (eval.ctm_likelihood_compat).
  """
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
    bits_of_batch, nfe = likelihood.bits_per_dim(
        method.denoise, params, batch["image"][part],
        None if labels is None else labels[part],
        jax.random.fold_in(jax.random.key(section.seeds[0]), first), settings,
    )
    bits.append(bits_of_batch)
    calls = max(calls, nfe)
  bits = np.concatenate(bits)
  return {
      "images": len(bits),
      "bits_per_dim": float(np.mean(bits)),
      "standard_error": float(np.std(bits) / np.sqrt(len(bits))),
      "nfe": calls,
      "legacy": section.ctm_likelihood_compat,
  }


def summary(numbers: Numbers) -> str:
  """Formats the result as one line of text."""
  return (
      f"likelihood: {numbers['bits_per_dim']:.3f} +- "
      f"{numbers['standard_error']:.3f} bits/dim "
      f"({numbers['images']} test images, {numbers['nfe']} NFE)"
  )
