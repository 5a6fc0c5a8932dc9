"""Checkpoints with digests, and the work directory of a run."""
