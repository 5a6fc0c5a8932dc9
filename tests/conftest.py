"""What every test relies on, set before anything imports JAX or TFDS."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Always replaced, so that no test reads or writes a user's own data sets. The
# folder goes when the interpreter does, and this name with it.
_tfds_dir = tempfile.TemporaryDirectory(prefix="bcm_jax_tfds_")
os.environ["TFDS_DATA_DIR"] = _tfds_dir.name

# Programs run a few times here; compiling them well would take longer.
# `toys.optimized` is for the exceptions.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Tests compile the same tiny programs again and again, in this process and in
# those they start; each is compiled once a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="bcm_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

from tests import quick  # noqa: E402  (It imports JAX, which reads all this.)

# Tests of sharding need several devices; four exist on any CPU this way.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
      f"{os.environ.get('XLA_FLAGS', '')} {quick.flags(4)}"
  )
