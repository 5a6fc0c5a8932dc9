"""A classifier trained here as features, where FID's weights cannot be had.

`python -m bcm_jax.train_classifier` makes a folder with classifier.safetensors
and classifier.json; `load_classifier` turns it into features. Distances on
them are called 'FD (digits ResNet)', never FID, and compare only with others
on the same weights, which the digest names.
"""

from collections.abc import Mapping
import contextlib
import json
import os
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import weight_files
from bcm_jax.metrics import feature_extractors
from bcm_jax.models import resnet
from bcm_jax.utils import files

Params = Any

WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"
_ATTRIBUTES = ("num_classes", "widths", "blocks", "stem_stride")


class Classifier(feature_extractors.NetworkFeatures):
  """Features of a classifier, and the classes that it sees.

  Args:
    name: of the features.
    network: what `params` belong to.
    params: of the network.
    image_shape: (H, W, C) of the images that it was trained on.
    batch_size: images at a time.
  """

  def __init__(
      self,
      name: str,
      network: resnet.ResNet,
      params: Params,
      image_shape: tuple[int, int, int],
      batch_size: int = 64,
  ):
    # The digest depends on all that turns an image into features.
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
    """Pooled features and class probabilities of uint8 images [n, H, W, C].

    Raises:
      UserError: images of another type or shape than it was trained on.
    """
    feature_extractors.check_images(images)
    if images.shape[1:] != self.image_shape:
      raise UserError(
          f"{self.name} got images of shape {images.shape[1:]}, expected "
          f"{self.image_shape}, those it was trained on; train a classifier "
          "on images like these"
      )
    return super().__call__(images)

  def classify(self, images: np.ndarray) -> np.ndarray:
    """Most probable classes, int [n], of uint8 images [n, H, W, C].

    Raises:
      UserError: images of another type or shape than it was trained on.
    """
    return np.argmax(self(images).probabilities, axis=-1)


def _attributes(network: resnet.ResNet) -> dict[str, Any]:
  """Attributes as JSON knows them."""
  found = {name: getattr(network, name) for name in _ATTRIBUTES}
  return found | {"widths": list(network.widths)}


def save_classifier(
    path: str, classifier: Classifier, facts: Mapping[str, Any]
) -> None:
  """Writes a classifier's folder; at no time does it hold two halves.

  Args:
    path: folder; made where it is missing. A classifier there is replaced.
    facts: what else classifier.json tells, as JSON values.
  """
  # Without its facts a folder holds no classifier, so they go first and come
  # last.
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
  """Features of the classifier in a folder.

  Args:
    path: folder that bcm_jax.tools.train_classifier wrote.
    batch_size: images at a time.

  Returns:
    Features whose `pooled` are the pooled activations [n, D], whose
    `probabilities` are those of the classes [n, K] and whose `spatial` is None.

  Raises:
    UserError: no classifier there, or a damaged one.
  """
  name, digest, network, shape = _read_facts(path)
  weights = weight_files.read(os.path.join(path, WEIGHTS))
  params = traverse_util.unflatten_dict(weights.groups[""], sep=".")
  found = Classifier(name, network, params, shape, batch_size)
  if found.digest != digest:
    raise _damaged(path, f"weights of digest {found.digest}, not {digest}")
  return found


def _read_facts(path: str) -> tuple[str, str, resnet.ResNet, tuple]:
  """Name, digest, network and image shape out of classifier.json."""
  try:
    with open(os.path.join(path, FACTS), encoding="utf-8") as file:
      facts = json.load(file)
    network = resnet.ResNet(
        **facts["network"] | {"widths": tuple(facts["network"]["widths"])}
    )
    return facts["name"], facts["digest"], network, tuple(facts["image_shape"])
  except (FileNotFoundError, NotADirectoryError) as e:
    raise UserError(
        f"{path} holds no classifier (no {FACTS}); make one with: "
        "python -m bcm_jax.train_classifier --config=CONFIG --out=DIR"
    ) from e
  except (ValueError, TypeError, KeyError) as e:
    raise _damaged(path, f"{FACTS}: {type(e).__name__}: {e}") from e


def _damaged(path: str, why: str) -> UserError:
  return UserError(
      f"the classifier in {path} is damaged ({why}); restore the folder, or "
      "train it again with --overwrite"
  )
