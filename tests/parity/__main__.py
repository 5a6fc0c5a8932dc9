"""python -m tests.parity DIR: exit status 0 only if everything agrees."""

import sys

import jax

from tests.parity import runner

if __name__ == "__main__":
  # The tolerances are those of a CPU's float32, and float64 is needed too.
  jax.config.update("jax_platforms", "cpu")
  sys.exit(runner.main(sys.argv[1:]))
