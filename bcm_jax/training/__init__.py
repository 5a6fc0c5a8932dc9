"""The engine that knows no method: state, step, averages, checkpoints."""
