"""Sources of images and the pipeline from them to batches."""
