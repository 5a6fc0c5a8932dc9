"""Checkpoints with digests, recovery, and the work directory of a run."""
