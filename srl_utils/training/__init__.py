"""One training step of SRL-VAE, and what a run needs around it."""
