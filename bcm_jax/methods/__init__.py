"""Training methods, one module per method: pure per-example losses."""
