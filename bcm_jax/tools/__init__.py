"""Inspection, ahead-of-time compilation, a classifier for metrics."""
