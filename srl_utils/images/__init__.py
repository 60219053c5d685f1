"""Image files and data sets to tensors: pixel ranges, decoding, sources, batches."""
