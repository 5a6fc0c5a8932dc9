"""Inception-v3 of the FID: the state dict that pytorch-fid publishes.

pt_inception-2015-12-05-6726825d.pth, TensorFlow's weights under torchvision's
names.
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
  """`Mixed_5b/branch1x1/var`: Mixed_5b.branch1x1.bn.running_var."""
  size = inception.IMAGE_SIZE
  shapes = jax.eval_shape(
      inception.InceptionV3().init, jax.random.key(0),
      jnp.zeros((1, size, size, 3)),
  )["params"]
  entries = []
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    names = _CLASSIFIER if path[0] == "fc" else _LEAVES
    name, layout = names[path[-1]]
    foreign = ".".join([*path[:-1], name])
    entries.append((layouts.Entry(path, foreign, layout), leaf.shape))
  return entries


def _used(name: str) -> bool:
  return not (
      name.startswith("AuxLogits.") or name.endswith(".num_batches_tracked")
  )


def to_params(tensors: feature_weights.Tensors) -> dict[str, Any]:
  """Parameters of `InceptionV3` from a state dict.

  The auxiliary classifier and PyTorch's counters of batches are left out.

  Raises:
    UserError: tensors missing, left over or of other shapes.
  """
  used = {name: value for name, value in tensors.items() if _used(name)}
  return feature_weights.to_tree(table(), used, _NAME)


def to_state_dict(params: Mapping[str, Any]) -> feature_weights.Tensors:
  """The state dict of parameters of `InceptionV3`."""
  return feature_weights.to_tensors(table(), params)


def load_inception(path: str) -> dict[str, Any]:
  """Reads parameters of `InceptionV3`.

  Args:
    path: of pytorch-fid's .pth, or the same tensors as .safetensors.

  Raises:
    UserError: the file cannot be read or holds other weights; says which.
  """
  tensors = feature_weights.read_tensors(path)
  try:
    return to_params(tensors)
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
