"""Helpers that every layer may import."""
