"""Image datasets and the input pipeline."""
