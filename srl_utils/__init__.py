"""SRL-VAE: smooth, robust latent encoding for diffusers autoencoders (arXiv 2504.17219)."""
