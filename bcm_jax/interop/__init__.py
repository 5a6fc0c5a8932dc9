"""Foreign weight files in and out, as plain NumPy arrays."""
