"""Batched sampling, guides, teacher pairs and conversion of weights."""
