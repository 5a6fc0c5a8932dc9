"""bcm_jax: few-step generative models in JAX.

Bidirectional consistency models and their relatives: one network
f(x, t, u) carries an image from noise level t to noise level u, in either
direction, in one call. `load` opens a checkpoint:

    model = bcm_jax.load("runs/digits")
    images = model.sample(16)
"""

from typing import Any

__version__ = "0.1.0"


def load(source: Any = None, **options: Any) -> Any:
  """Opens a checkpoint as a model that samples, inverts and edits.

  Args:
    source: work directory of a run, or a folder of bcm_jax.export.hub; None is
      the small network of digits that is part of this package.
    **options: average, step, batch_size; see pretrained.load.

  Returns:
    A pretrained.Model.
  """
  # Imported here so that `import bcm_jax` does not import JAX.
  from bcm_jax.editing import pretrained

  return pretrained.load(source, **options)
