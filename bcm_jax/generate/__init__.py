"""Batched sampling, guidance networks, teacher pairs, weight conversion."""
