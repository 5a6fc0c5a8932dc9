"""LPIPS with VGG16: state dicts of torchvision and of the package `lpips`.

Torchvision's vgg16 has the convolutions (`features.0.weight`), the package's
weights/v0.1/vgg.pth the linear layers (`lin0.model.1.weight`). A file may hold
both, also as the state dict of a whole `lpips.LPIPS`.
"""

from collections.abc import Mapping
import functools
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from bcm_jax.errors import UserError
from bcm_jax.interop import feature_weights
from bcm_jax.interop import layouts
from bcm_jax.models import vgg

# A linear layer of one output, as a 1x1 convolution there.
_LINEAR = layouts.Layout(
    lambda v: v.reshape(-1), lambda v: v[None, :, None, None]
)
# Torchvision's classifier; constants; the linear layers, listed once more.
_UNUSED = re.compile(r"classifier\.|scaling_layer\.|lins\.")
_NAME = "LPIPS with VGG16 (torchvision's vgg16 and lpips's vgg.pth)"


@functools.cache
def table() -> feature_weights.Table:
  """`vgg/features_0/kernel`: features.0.weight; `linear/lin0`: lin0..."""
  shapes = jax.eval_shape(
      vgg.VGG16().init, jax.random.key(0),
      jnp.zeros((1, vgg.SMALLEST, vgg.SMALLEST, 3)),
  )["params"]
  entries = []
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    name, layout = layouts.torch_leaf(path[-1], leaf.ndim)
    foreign = f"{path[0].replace('_', '.')}.{name}"
    entry = layouts.Entry(("vgg", *path), foreign, layout)
    entries.append((entry, leaf.shape))
  for i, (_, channels) in enumerate(vgg.BLOCKS):
    name = f"lin{i}"
    entry = layouts.Entry(
        ("linear", name), f"{name}.model.1.weight", _LINEAR
    )
    entries.append((entry, (channels,)))
  return entries


def to_params(tensors: feature_weights.Tensors) -> dict[str, Any]:
  """Parameters of `metrics.lpips` from all tensors that it needs.

  Raises:
    UserError: tensors missing, left over, of other shapes, or linear weights
      below 0.
  """
  used = {
      re.sub(r"^net\.slice\d\.", "features.", name): value
      for name, value in tensors.items() if not _UNUSED.match(name)
  }
  params = feature_weights.to_tree(table(), used, _NAME)
  negative = [n for n, v in params["linear"].items() if (v < 0).any()]
  if negative:
    raise UserError(
        f"the linear weights of LPIPS are below 0 in {', '.join(negative)}, "
        "expected none there; use lpips's weights/v0.1/vgg.pth"
    )
  return params


def to_state_dict(params: Mapping[str, Any]) -> feature_weights.Tensors:
  """The tensors of parameters of `metrics.lpips`, all in one."""
  return feature_weights.to_tensors(table(), params)


def load_lpips(*paths: str) -> dict[str, Any]:
  """Reads parameters of `metrics.lpips`.

  Args:
    *paths: one file with all tensors, or torchvision's and lpips's.

  Returns:
    {'vgg': parameters of `VGG16`, 'linear': {'lin0': [64], ...}}.

  Raises:
    UserError: a file cannot be read, or they do not hold what is needed; says
      what is missing.
  """
  tensors: feature_weights.Tensors = {}
  for path in paths:
    tensors |= feature_weights.read_tensors(path)
  try:
    return to_params(tensors)
  except UserError as e:
    raise UserError(f"{', '.join(paths)}: {e}") from None
