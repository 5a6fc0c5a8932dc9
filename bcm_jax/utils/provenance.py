"""Provenance of results: config, commit, versions, hardware."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
import ml_collections

from bcm_jax import __version__
from bcm_jax.utils import hashing


def facts(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the provenance of a run with a resolved config."""
  return {
      "data": data_name(config.data),
      "method": config.method.name,
      "config_digest": hashing.json_digest(config.to_dict())[:12],
  } | machine()


def data_name(data: ml_collections.ConfigDict) -> str:
  """Returns the dataset's name; of image files, their folder or file."""
  if data.path is None:
    return data.name
  path = pathlib.Path(data.path).expanduser().resolve()
  return path.stem if path.suffix in (".npz", ".zip") else path.name


def machine() -> dict[str, Any]:
  """Returns versions, commit and hardware."""
  return {
      "bcm_jax": __version__,
      "commit": commit(),
      "jax": jax.__version__,
      "flax": importlib.metadata.version("flax"),
      "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
                  f"{os.cpu_count()} cores, {platform.machine()}",
  }


def commit() -> str | None:
  """Returns the commit of the checkout, None for an installed package."""
  folder = os.path.dirname(os.path.abspath(__file__))
  try:
    result = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, timeout=10, check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return result.stdout.strip()
