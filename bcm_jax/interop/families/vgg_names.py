"""Tensor names of LPIPS with VGG16: torchvision and the package `lpips`.

The convolutions are in torchvision's vgg16 (`features.0.weight`), the linear
layers in weights/v0.1/vgg.pth of `lpips` (`lin0.model.1.weight`). A file with
both, such as the state dict of `lpips.LPIPS`, is also accepted.
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

# A linear layer with one output, a 1x1 convolution in PyTorch.
_LINEAR = layouts.Layout(
    lambda v: v.reshape(-1), lambda v: v[None, :, None, None]
)
# Torchvision's classifier, constants, and duplicates of the linear layers.
_UNUSED = re.compile(r"classifier\.|scaling_layer\.|lins\.")
_NAME = "LPIPS with VGG16 (torchvision's vgg16 and lpips's vgg.pth)"


@functools.cache
def table() -> feature_weights.Table:
  """Returns the name table.

  For example vgg/features_0/kernel -> features.0.weight and linear/lin0 ->
  lin0.model.1.weight.
  """
  shapes = jax.eval_shape(
      vgg.VGG16().init, jax.random.key(0),
      jnp.zeros((1, vgg.SMALLEST, vgg.SMALLEST, 3)),
  )["params"]
  entries = []
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    name, layout = layouts.torch_leaf(path[-1], leaf.ndim)
    tensor_name = f"{path[0].replace('_', '.')}.{name}"
    entry = layouts.Entry(("vgg", *path), tensor_name, layout)
    entries.append((entry, leaf.shape))
  for i, (_, channels) in enumerate(vgg.BLOCKS):
    name = f"lin{i}"
    entry = layouts.Entry(
        ("linear", name), f"{name}.model.1.weight", _LINEAR
    )
    entries.append((entry, (channels,)))
  return entries


def to_params(tensors: feature_weights.Tensors) -> dict[str, Any]:
  """Converts state dict tensors to parameters of `metrics.lpips`.

  Raises:
    UserError: tensors are missing, unexpected or have another shape, or a
      linear weight is negative.
  """
  used = {
      re.sub(r"^net\.slice\d\.", "features.", name): value
      for name, value in tensors.items() if not _UNUSED.match(name)
  }
  params = feature_weights.to_tree(table(), used, _NAME)
  negative = [n for n, v in params["linear"].items() if (v < 0).any()]
  if negative:
    raise UserError(
        f"tensors: got negative linear weights in {', '.join(negative)}, "
        "expected 0 or more; use weights/v0.1/vgg.pth of lpips"
    )
  return params


def to_state_dict(params: Mapping[str, Any]) -> feature_weights.Tensors:
  """Converts parameters of `metrics.lpips` to one dictionary of tensors."""
  return feature_weights.to_tensors(table(), params)


def load_lpips(*paths: str) -> dict[str, Any]:
  """Reads parameters of `metrics.lpips`.

  Args:
    *paths: one file with all tensors, or the files of torchvision and lpips.

  Returns:
    {'vgg': parameters of `VGG16`, 'linear': {'lin0': [64], ...}}.

  Raises:
    UserError: a file cannot be read, or tensors are missing or unexpected.
  """
  tensors: feature_weights.Tensors = {}
  for path in paths:
    tensors |= feature_weights.read_tensors(path)
  try:
    return to_params(tensors)
  except UserError as e:
    raise UserError(f"{', '.join(paths)}: {e}") from None
