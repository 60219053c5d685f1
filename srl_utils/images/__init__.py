"""Image files and datasets to tensors: pixel ranges, decoding, sources, batches."""
