"""Tensor names of pytorch-fid's Inception-v3 for `InceptionV3`.

The file pt_inception-2015-12-05-6726825d.pth has TensorFlow's weights under
torchvision's names.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from bcm_jax.errors import UserError
from bcm_jax.interop import feature_weights
from bcm_jax.interop import layouts
from bcm_jax.models import inception

_LEAVES = {
    "kernel": ("conv.weight", layouts.CONV),
    "scale": ("bn.weight", layouts.SAME),
    "bias": ("bn.bias", layouts.SAME),
    "mean": ("bn.running_mean", layouts.SAME),
    "var": ("bn.running_var", layouts.SAME),
}
_CLASSIFIER = {
    "kernel": ("weight", layouts.DENSE), "bias": ("bias", layouts.SAME)
}
_NAME = "the FID's Inception-v3 (pytorch-fid)"


@functools.cache
def table() -> feature_weights.Table:
  """Returns the name table.

  For example Mixed_5b/branch1x1/var -> Mixed_5b.branch1x1.bn.running_var.
  """
  size = inception.IMAGE_SIZE
  shapes = jax.eval_shape(
      inception.InceptionV3().init, jax.random.key(0),
      jnp.zeros((1, size, size, 3)),
  )["params"]
  entries = []
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    names = _CLASSIFIER if path[0] == "fc" else _LEAVES
    name, layout = names[path[-1]]
    tensor_name = ".".join([*path[:-1], name])
    entries.append((layouts.Entry(path, tensor_name, layout), leaf.shape))
  return entries


def _used(name: str) -> bool:
  return not (
      name.startswith("AuxLogits.") or name.endswith(".num_batches_tracked")
  )


def to_params(tensors: feature_weights.Tensors) -> dict[str, Any]:
  """Converts a state dict to parameters of `InceptionV3`.

  Ignores the auxiliary classifier and PyTorch's batch counters.

  Raises:
    UserError: tensors are missing, unexpected or have another shape.
  """
  used = {name: value for name, value in tensors.items() if _used(name)}
  return feature_weights.to_tree(table(), used, _NAME)


def to_state_dict(params: Mapping[str, Any]) -> feature_weights.Tensors:
  """Converts parameters of `InceptionV3` to a state dict."""
  return feature_weights.to_tensors(table(), params)


def load_inception(path: str) -> dict[str, Any]:
  """Reads parameters of `InceptionV3`.

  Args:
    path: path of pytorch-fid's .pth, or of a .safetensors with its tensors.

  Raises:
    UserError: the file cannot be read or has other tensors; names them.
  """
  tensors = feature_weights.read_tensors(path)
  try:
    return to_params(tensors)
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
