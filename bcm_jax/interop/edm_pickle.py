"""Network pickles of EDM, EDM2 and their descendants, never executed.

Such a file is a plain pickle of dict(ema=network, ...), in which every module
comes with its source code (`torch_utils/persistence.py` of EDM, Karras et al.,
2022) and every storage as a nested legacy file. The code is dropped unread.
"""

from typing import Any

import numpy as np

from bcm_jax.errors import UserError
from bcm_jax.interop import pickle_machine
from bcm_jax.interop import torch_files
from bcm_jax.interop.cursor import Cursor
from bcm_jax.interop.pickle_machine import shown
from bcm_jax.interop.torch_pickle import lookup
from bcm_jax.interop.torch_pickle import Module
from bcm_jax.interop.trees import Walker

_NETWORKS = ("ema", "net")


def read(
    content: bytes,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
  """Reads the averaged network of a pickle, or else the trained one.

  Args:
    content: of the whole file.

  Returns:
    groups: {'ema': {dotted name: array}}, or 'net'; parameters and buffers,
      in the dtype they were saved in.
    metadata: of the network class_name, init_args and init_kwargs (its
      constructor's arguments) and attributes (its plain attributes); modules,
      {dotted name: the same three of each part}; and the file's other entries
      under their own names, described.

  Raises:
    UserError: a name that is refused, a damaged file, or one without a
      network.
  """
  names = lookup(torch_files.read_storage)
  tree = pickle_machine.load(Cursor(content), names)
  keys = tree if type(tree) is dict else ()
  found = next((name for name in _NETWORKS if name in keys), None)
  if found is None:
    held = ", ".join(map(shown, keys)) or shown(tree)
    raise UserError(
        f"the pickle holds {held[:400]}, expected a network under 'ema' or"
        " 'net'; give a network snapshot of EDM or EDM2"
    )
  walker = Walker()
  tensors, rest = walker.part(tree[found])
  if not tensors:
    raise UserError(f"{found!r} holds no tensors; give a network snapshot")
  metadata = {
      str(key): walker.plain(value)
      for key, value in tree.items()
      if key != found
  }
  if isinstance(tree[found], Module):
    attributes = _attributes(tree[found], walker)
    metadata |= rest | dict(attributes=attributes, modules=walker.modules)
  return {found: tensors}, metadata


def _attributes(module: Module, walker: Walker) -> dict[str, Any]:
  """Returns the attributes that are numbers, text or lists of them."""
  return {
      name: walker.plain(value)
      for name, value in module.state.items()
      if not str(name).startswith("_") and not isinstance(value, Module)
  }
