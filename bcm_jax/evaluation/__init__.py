"""Evaluation of checkpoints: sample quality, inversion and likelihood."""
