"""Sampling plans, samplers, inversion, likelihood and zero-shot editing."""
