"""What leaves a run: folders to give away, and StableHLO."""
