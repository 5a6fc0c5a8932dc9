"""Classifier features for the Frechet distance, in place of Inception.

`python -m bcm_jax.train_classifier` writes a folder with classifier.safetensors
and classifier.json; `load_classifier` returns its feature extractor. Distances
on these features are named 'FD (digits ResNet)', never FID, and are comparable
only between results of the same weights (same digest).
"""

from collections.abc import Mapping
import contextlib
import json
import os
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from bcm_jax.data import image_source
from bcm_jax.errors import UserError
from bcm_jax.interop import weight_files
from bcm_jax.metrics import feature_extractors
from bcm_jax.models import resnet
from bcm_jax.utils import files

Params = Any

WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"
_ATTRIBUTES = ("num_classes", "widths", "blocks", "stem_stride")


class Classifier(feature_extractors.NetworkFeatures):
  """Pooled features and class probabilities of a trained classifier.

  Args:
    name: name of the features.
    network: ResNet that `params` belong to.
    params: parameters of the network.
    image_shape: (H, W, C) of the training images.
    batch_size: images per batch.
  """

  def __init__(
      self,
      name: str,
      network: resnet.ResNet,
      params: Params,
      image_shape: tuple[int, int, int],
      batch_size: int = 64,
  ):
    # The digest covers the preprocessing and the architecture too.
    preprocessing = (
        f"x / 127.5 - 1 of {tuple(image_shape)}, {_attributes(network)}"
    )

    def apply(params, images):
      pooled, logits = network.apply({"params": params}, images)
      return feature_extractors.Activations(
          pooled, probabilities=jax.nn.softmax(logits)
      )

    super().__init__(
        name, apply, params, preprocessing, batch_size=batch_size
    )
    self.network, self.params = network, params
    self.image_shape = tuple(image_shape)

  def __call__(self, images: np.ndarray) -> feature_extractors.Activations:
    """Computes pooled features and class probabilities.

    Args:
      images: uint8 [n, H, W, C].

    Raises:
      UserError: dtype or shape differ from those of the training images.
    """
    image_source.check_images(images, "classifier")
    if images.shape[1:] != self.image_shape:
      raise UserError(
          f"{self.name}: got images of shape {images.shape[1:]}, expected "
          f"{self.image_shape} as in training; train a classifier on images "
          "of this shape"
      )
    return super().__call__(images)

  def classify(self, images: np.ndarray) -> np.ndarray:
    """Returns the most probable classes, int [n], of uint8 images [n, H, W, C].

    Raises:
      UserError: dtype or shape differ from those of the training images.
    """
    return np.argmax(self(images).probabilities, axis=-1)


def _attributes(network: resnet.ResNet) -> dict[str, Any]:
  """Returns the network's attributes as JSON values."""
  attributes = {name: getattr(network, name) for name in _ATTRIBUTES}
  return attributes | {"widths": list(network.widths)}


def save_classifier(
    path: str, classifier: Classifier, facts: Mapping[str, Any]
) -> None:
  """Writes a classifier's folder, so that an interrupted write is detected.

  Args:
    path: folder; created if missing. A classifier in it is replaced.
    classifier: classifier to save.
    facts: further entries of classifier.json, as JSON values.
  """
  # A folder without classifier.json is not loaded, so the file is removed
  # before the weights are replaced and written after them.
  with contextlib.suppress(FileNotFoundError):
    os.remove(os.path.join(path, FACTS))
  flat = traverse_util.flatten_dict(classifier.params, sep=".")
  weight_files.write(
      os.path.join(path, WEIGHTS), {k: np.asarray(v) for k, v in flat.items()}
  )
  files.write_json(
      os.path.join(path, FACTS),
      {
          "name": classifier.name,
          "digest": classifier.digest,
          "network": _attributes(classifier.network),
          "image_shape": list(classifier.image_shape),
          **facts,
      },
  )


def load_classifier(path: str, batch_size: int = 64) -> Classifier:
  """Loads the feature extractor of a classifier.

  Args:
    path: folder written by bcm_jax.tools.train_classifier.
    batch_size: images per batch.

  Returns:
    Features with `pooled` [n, D], class `probabilities` [n, K] and `spatial`
    None.

  Raises:
    UserError: the folder has no classifier, or a corrupt one.
  """
  name, digest, network, shape = _read_facts(path)
  weights = weight_files.read(os.path.join(path, WEIGHTS))
  params = traverse_util.unflatten_dict(weights.groups[""], sep=".")
  classifier = Classifier(name, network, params, shape, batch_size)
  if classifier.digest != digest:
    raise _corrupt_file_error(
        path, f"weights of digest {classifier.digest}, not {digest}"
    )
  return classifier


def _read_facts(path: str) -> tuple[str, str, resnet.ResNet, tuple]:
  """Reads name, digest, network and image shape from classifier.json."""
  try:
    with open(os.path.join(path, FACTS), encoding="utf-8") as file:
      facts = json.load(file)
    network = resnet.ResNet(
        **facts["network"] | {"widths": tuple(facts["network"]["widths"])}
    )
    return facts["name"], facts["digest"], network, tuple(facts["image_shape"])
  except (FileNotFoundError, NotADirectoryError) as e:
    raise UserError(
        f"{path}: has no classifier (no {FACTS}); train one with python -m "
        "bcm_jax.train_classifier --config=CONFIG --out=DIR"
    ) from e
  except (ValueError, TypeError, KeyError) as e:
    raise _corrupt_file_error(
        path, f"{FACTS}: {type(e).__name__}: {e}"
    ) from e


def _corrupt_file_error(path: str, reason: str) -> UserError:
  return UserError(
      f"{path}: the classifier is corrupt ({reason}); restore the folder, or "
      "train it again with --overwrite"
  )
