"""Generators, discriminators and feature networks as Flax modules."""
