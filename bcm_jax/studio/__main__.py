"""Opens the studio: python -m bcm_jax.studio."""

from bcm_jax.studio import app

if __name__ == "__main__":
  app.main()
