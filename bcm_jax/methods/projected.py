"""Features that a user gives for a discriminator to judge by.

A frozen network of anything, such as ImageNet's classes, whose features are
mixed at random (models.projection). CTM was published with DeiT and
EfficientNet in this place. Distances measured with the same or like features
are then no longer independent of the training.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bcm_jax import errors
from bcm_jax.interop.families import vgg_names
from bcm_jax.metrics import lpips
from bcm_jax.models import projection
from bcm_jax.utils import cli

Params = Any


@dataclasses.dataclass(frozen=True)
class Projected:
  """A frozen network with its mixing, in the place of a teacher's encoder.

  Attributes:
    backbone: (parameters, images [B, H, W, C] in [-1, 1]) -> features
      [B, H, W, C] of one or more levels, fine to coarse; differentiable.
    load: () -> its parameters.
  """

  backbone: Callable[[Params, jax.Array], list[jax.Array]]
  load: Callable[[], Params]
  mixing = projection.Projection()

  def init(self, key, images, labels) -> Params:
    """The network's parameters and the mixing's, for images [B, H, W, C]."""
    del labels
    params = self.load()
    shapes = jax.eval_shape(self.backbone, params, images)
    mixing = self.mixing.init(
        key, [jnp.zeros(s.shape, s.dtype) for s in shapes]
    )
    return {"backbone": params, "mixing": mixing["params"]}

  def features(self, params, images, sigma, labels) -> list[jax.Array]:
    """Mixed features [B, H, W, C], one tensor a level, fine to coarse.

    A noise level and a class mean nothing to the network.
    """
    del sigma, labels
    found = self.backbone(params["backbone"], images)
    return self.mixing.apply({"params": params["mixing"]}, found)


def _vgg(params: Params, images: jax.Array) -> list[jax.Array]:
  """Features of VGG16 after blocks two to five."""
  return lpips.features(params, lpips.enlarge(images))[1:]


@functools.cache
def by_name(name: str, path: tuple[str, ...]) -> Projected:
  """The network that `method.gan_encoder` names.

  Args:
    name: 'vgg', or 'module:function' of a function that takes no arguments and
      returns (backbone, parameters).
    path: files of VGG16's weights, as eval.lpips_path.

  Raises:
    UserError: unknown name, a function that cannot be imported, no weights.
  """
  if name == "vgg":
    if not path:
      raise errors.UserError(
          "method.gan_encoder='vgg' needs weights: set method.gan_encoder_path "
          "as docs/evaluation.md says of eval.lpips_path"
      )
    return Projected(_vgg, lambda: vgg_names.load_lpips(*path)["vgg"])
  if ":" not in name:
    raise errors.unknown_name(
        "method.gan_encoder", name, ["teacher", "vgg", "module:function"]
    )
  backbone, params = cli.named_function(
      "method.gan_encoder", name, "that returns (backbone, parameters)"
  )()
  return Projected(backbone, lambda: params)
