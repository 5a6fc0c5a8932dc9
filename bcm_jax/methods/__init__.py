"""What is learnt: one file a method, pure per-example losses."""
