"""Compiles programs that a test runs only once or twice."""

from collections.abc import Callable
import functools

import jax
import jaxlib


@functools.cache
def options() -> dict | None:
  """XLA's settings of quick compilation, if this version knows them."""
  found = {
      "xla_backend_optimization_level": 0,
      "xla_cpu_use_fusion_emitters": False,
  }
  try:
    jax.jit(lambda: 0, compiler_options=found)()
  except jax.errors.JaxRuntimeError:
    return None
  return found


def flags(devices: int | None = None) -> str:
  """XLA_FLAGS of quick compilation, and of so many devices on a CPU.

  Networks compile in four fifths of the time without MLIR's fusions. An unknown
  flag ends the process, so it is given to versions alone that know it.
  """
  found = []
  if jaxlib.__version__.startswith("0.10."):
    found.append("--xla_cpu_use_fusion_emitters=false")
  if devices is not None:
    found.append(f"--xla_force_host_platform_device_count={devices}")
  return " ".join(found)


def jit(f: Callable) -> Callable:
  """jax.jit without optimisation: compiles three times as fast, runs slower.

  For networks, this is also much quicker than running operation by operation,
  each of which is compiled on its own.
  """
  return jax.jit(f, compiler_options=options())
