"""A checkpoint in, numbers out."""
