"""Classifier rejection sampling (CTM; Kim et al., 2024).

Generates more images than requested and keeps the most confident per class: the
images with the highest probability of their class by a classifier. It reduces
recall; result files record that it was used.
"""

import math

import numpy as np

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.generate import batched_sampler
from bcm_jax.metrics import classifier
from bcm_jax.sampling import sampling_plan


def best(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
  """Returns the indices of the images with the highest scores in each class.

  Args:
    scores: [n], higher is better.
    labels: [n], classes 0 .. K - 1, each with n / K images or one more.
    count: number of images to keep, the same number per class; the first
      count mod K classes keep one more.

  Returns:
    [count] indices, ascending.
  """
  kept = []
  num_classes = int(labels.max()) + 1
  for label in range(num_classes):
    num_kept = len(range(label, count, num_classes))
    members = np.flatnonzero(labels == label)
    order = np.argsort(-scores[members], kind="stable")
    kept.append(members[order[:num_kept]])
  return np.sort(np.concatenate(kept))


def generate(
    experiment: build.Experiment,
    runner: batched_sampler.BatchedSampler,
    plan: sampling_plan.Plan,
    count: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Generates images with classifier rejection.

  Args:
    experiment: config section sample, with rejection.
    runner: sampler with the parameters.
    plan: sampling plan.
    count: number of images to keep.
    seed: seed of the images.

  Returns:
    (images [count, H, W, C] uint8, labels [count] int32).
  """
  section = experiment.sample
  classify = classifier.load_classifier(section.rejection_classifier)
  num_generated = math.ceil(count * (1 + section.rejection))
  labels = (np.arange(num_generated) % experiment.num_classes).astype(np.int32)

  def rows(index):
    images = batched_sampler.generate(
      experiment, runner, plan, labels, index, seed
    )
    probabilities = classify(images).probabilities
    return images, probabilities[np.arange(len(index)), labels[index]]

  images, scores = batched_sampler.on_all_hosts(num_generated, rows)
  kept = best(scores, labels, count)
  return images[kept], labels[kept]


def check(experiment: build.Experiment) -> None:
  """Checks the options of rejection in config section sample.

  Raises:
    UserError: sample.rejection is negative, the network is unconditional, a
      class is selected, or the classifier is missing.
  """
  section = experiment.sample
  if not section.rejection:
    return
  if section.rejection < 0:
    raise errors.UserError(
      f"sample.rejection: got {section.rejection}, expected at least 0; set "
      "0.5 to generate 50% more images than are kept"
    )
  if experiment.num_classes is None or section.label is not None:
    raise errors.UserError(
      f"sample.rejection: got {section.rejection} with "
      f"model.num_classes={experiment.num_classes} and "
      f"sample.label={section.label}, expected a class-conditional network and "
      "all classes; set sample.label=none or sample.rejection=0"
    )
  if section.rejection_classifier is None:
    raise errors.UserError(
      "sample.rejection_classifier: got None, expected the folder of a "
      "classifier; train one by bcm_jax train_classifier"
    )
  classifier.load_classifier(section.rejection_classifier)
