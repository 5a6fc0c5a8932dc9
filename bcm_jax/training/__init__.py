"""Training state, step, averages, sharding and logging; names no method."""
