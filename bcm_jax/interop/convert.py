"""Converts published weights: python -m bcm_jax.interop.convert SOURCE OUT."""

from bcm_jax.generate import convert

if __name__ == "__main__":
  convert.main()
