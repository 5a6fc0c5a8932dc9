"""Tensor names of published networks, one module per family."""
