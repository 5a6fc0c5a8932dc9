"""Classifier rejection sampling: oversample, keep the most confident per class.

Kim et al. (CTM, 2024) draw half as many again and keep those whose class a
classifier is surest of. Recall pays for it; results tell that it was done.
"""

import math

import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.generate import batched_sampler
from bcm_jax.metrics import classifier
from bcm_jax.sampling import sampling_plan


def best(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
  """Returns indices of `count` images with the highest scores per class.

  Args:
    scores: [n], higher is better.
    labels: [n], classes 0 .. K - 1, each with n / K images or one more.
    count: images to keep; the first count mod K classes keep one more.

  Returns:
    [count], ascending.
  """
  kept = []
  classes = int(labels.max()) + 1
  for label in range(classes):
    share = len(range(label, count, classes))
    mine = np.flatnonzero(labels == label)
    order = np.argsort(-scores[mine], kind="stable")
    kept.append(mine[order[:share]])
  return np.sort(np.concatenate(kept))


def generate(
    experiment: build.Experiment,
    runner: batched_sampler.BatchedSampler,
    plan: sampling_plan.Plan,
    count: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """(uint8 images [count, H, W, C], their classes), after rejection."""
  section = experiment.sample
  judge = classifier.load_classifier(section.rejection_classifier)
  drawn = math.ceil(count * (1 + section.rejection))
  labels = (np.arange(drawn) % experiment.num_classes).astype(np.int32)

  def rows(index):
    images = batched_sampler.generate(
      experiment, runner, plan, labels, index, seed
    )
    seen = judge(images).probabilities
    return images, seen[np.arange(len(index)), labels[index]]

  images, scores = batched_sampler.on_all_hosts(drawn, rows)
  kept = best(scores, labels, count)
  return images[kept], labels[kept]


def check(experiment: build.Experiment) -> None:
  """Raises UserError where section sample asks for what cannot be done."""
  section = experiment.sample
  if not section.rejection:
    return
  if section.rejection < 0:
    raise errors.UserError(
      f"sample.rejection={section.rejection} must be at least 0; 0.5 draws "
      "half as many images again"
    )
  if experiment.num_classes is None or section.label is not None:
    raise errors.UserError(
      "sample.rejection keeps the best images of every class; it takes a "
      "class-conditional network and sample.label=none"
    )
  if section.rejection_classifier is None:
    raise errors.UserError(
      "sample.rejection needs sample.rejection_classifier, a folder that "
      "python -m bcm_jax.train_classifier wrote"
    )
  classifier.load_classifier(section.rejection_classifier)
