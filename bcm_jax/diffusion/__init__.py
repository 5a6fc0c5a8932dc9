"""Diffusion processes, preconditioning, schedules, distances and solvers."""
