"""bcm_jax: few-step generative models in JAX.

Bidirectional consistency models (Li & He, 2024) and related methods: a flow
map f(x, t, u) moves an image from noise level t to noise level u, in either
direction, in one network evaluation. `load` opens a checkpoint:

    model = bcm_jax.load("runs/digits")
    images = model.sample(16)
"""

from typing import Any

__version__ = "0.1.0"


def load(source: Any = None, **options: Any) -> Any:
  """Opens a checkpoint as a model that samples, inverts and edits images.

  Args:
    source: work directory of a run, or a model folder of bcm_jax.release.hub;
      None is the digits network included in this package.
    **options: average, step, batch_size; see pretrained.load.

  Returns:
    A pretrained.Model.

  Raises:
    UserError: no readable checkpoint, or an invalid option.
  """
  # Imported here so that `import bcm_jax` does not import JAX.
  from bcm_jax.editing import pretrained

  return pretrained.load(source, **options)
