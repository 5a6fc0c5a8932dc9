"""Trains a classifier for metrics: python -m bcm_jax.train_classifier."""

from bcm_jax.tools import train_classifier

if __name__ == "__main__":
  train_classifier.main()
