"""Config schema, registries, resolution, validation and Experiment."""
