"""Shares models on the Hugging Face Hub: python -m bcm_jax.release.hub."""

from bcm_jax.export import hub

if __name__ == "__main__":
  hub.main()
