"""A classifier that judges whether an asked class is what came out.

A support vector machine on raw pixels: no network, no weights to download. On
8x8 digits it is nearly as good as the data allow: 356 of the 360 held-out ones
(98.9%), so a perfect generator cannot be expected to score above that.
"""

import numpy as np
import sklearn.svm

from bcm_jax.errors import UserError

# On pixels in [0, 1]; the usual gamma = 0.001 for pixels in 0..16 is
# 0.001 * 16^2 here.
DIGITS_GAMMA = 0.256


def _pixels(images: np.ndarray) -> np.ndarray:
  """uint8 [n, H, W, C] to float64 [n, H * W * C] in [0, 1]."""
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
    raise UserError(
      f"the judge got {images.dtype} of shape {images.shape}, expected "
      "uint8 images [n, H, W, C]: quantise to 0..255 first"
    )
  return images.reshape(len(images), -1) / 255.0


def _labels(labels: np.ndarray, count: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.shape != (count,) or labels.dtype.kind not in "iu":
    raise UserError(
      f"labels are {labels.dtype} of shape {labels.shape} for {count} "
      f"images, expected integers [{count}]: pass one class an image"
    )
  return labels


class SvcJudge:
  """Support vector classifier with a Gaussian kernel on pixels in [0, 1].

  Attributes:
    gamma: kernel width, exp(-gamma |a - b|^2).
  """

  def __init__(self, gamma: float):
    self.gamma = gamma
    self._svc = sklearn.svm.SVC(gamma=gamma)

  def fit(self, images: np.ndarray, labels: np.ndarray) -> "SvcJudge":
    """Fits to real images; deterministic.

    Args:
      images: uint8 [n, H, W, C].
      labels: integers [n], at least two classes.

    Returns:
      self, so that `judge = SvcJudge(gamma).fit(images, labels)` reads well.

    Raises:
      UserError: other dtypes or shapes, or a single class.
    """
    pixels = _pixels(images)
    labels = _labels(labels, len(pixels))
    if len(np.unique(labels)) < 2:
      raise UserError(
        f"the judge got one class only ({labels[0]}), expected at least "
        "two: fit it to a labelled split of the data"
      )
    self._svc.fit(pixels, labels)
    return self

  def predict(self, images: np.ndarray) -> np.ndarray:
    """Classes [n] of uint8 images [n, H, W, C].

    Raises:
      UserError: other dtype or shape, or another image size than in `fit`.
    """
    pixels = _pixels(images)
    expected = getattr(self._svc, "n_features_in_", pixels.shape[1])
    if pixels.shape[1] != expected:
      raise UserError(
        f"the judge got images of {pixels.shape[1]} values, expected "
        f"{expected} as it was fitted: use images of the same size"
      )
    return self._svc.predict(pixels)


class DigitJudge(SvcJudge):
  """The judge of the 8x8 handwritten digits: `DigitJudge().fit(...)`."""

  def __init__(self):
    super().__init__(DIGITS_GAMMA)


def recognition(
  predicted: np.ndarray, asked: np.ndarray
) -> dict[str, object]:
  """How often the class is seen that was asked for.

  Args:
    predicted: integers [n], n >= 1, the class that a judge sees.
    asked: integers [n], the class each image was asked to show.

  Returns:
    accuracy: share over all images. per_class: {class: share}, by class.
    worst_class, worst_class_accuracy: the least recognised (the lowest label
    among equals). Shares are in [0, 1].

  Raises:
    UserError: one label an image is not given.
  """
  right = np.asarray(predicted) == _labels(asked, len(predicted))
  per_class = {
    int(label): float(right[asked == label].mean())
    for label in np.unique(asked)
  }
  worst = min(per_class, key=per_class.__getitem__)
  return {
    "accuracy": float(right.mean()),
    "worst_class_accuracy": per_class[worst],
    "worst_class": worst,
    "per_class": per_class,
  }
