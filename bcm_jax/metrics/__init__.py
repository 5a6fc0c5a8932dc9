"""Metrics of sample quality and of reconstructions."""
