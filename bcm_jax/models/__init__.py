"""Networks as Flax Linen modules. Imports nothing of ours but models."""
