"""The command python -m bcm_jax.studio."""

from bcm_jax import command
from bcm_jax.studio import app

if __name__ == "__main__":
  command.quiet_tensorflow()
  app.main()
