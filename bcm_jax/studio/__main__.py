"""The command python -m bcm_jax.studio."""

from bcm_jax.studio import app
from bcm_jax.utils import cli

if __name__ == "__main__":
  cli.quiet_tensorflow()
  app.main()
