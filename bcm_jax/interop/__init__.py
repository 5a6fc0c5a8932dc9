"""Conversion of published weights to and from Flax parameters."""
