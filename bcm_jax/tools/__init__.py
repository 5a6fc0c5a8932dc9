"""Config inspection, ahead-of-time compilation and classifier training."""
